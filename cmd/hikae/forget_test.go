package main

import (
	"errors"
	"testing"
	"time"

	"hikae/repo"
	"hikae/repo/retention"
)

// A clock that was set back ends the rule before it decides anything.
func TestForgetWithAWrongClock(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	pass := []byte("correct horse")
	if err := repo.Init(ctx, dir, repo.InitOptions{Passphrase: pass, KDF: repo.KDF{Time: 1, MemoryKiB: 8, Threads: 1}}); err != nil {
		t.Fatal(err)
	}
	r, err := repo.Open(ctx, dir, repo.Passphrase(pass), repo.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	vm := repo.VMID{Host: "esx1", Name: "web01"}
	first := time.Date(2026, 1, 1, 2, 0, 0, 0, time.UTC)
	make := func(at time.Time) {
		t.Helper()
		s, err := r.Begin(ctx, repo.SessionOptions{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = s.Commit(ctx, repo.Manifest{VM: vm, Time: at, Mode: repo.ModeFull, Consistency: repo.ConsistencyOff})
		if err := errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		make(first.AddDate(0, 0, i))
	}
	keep := retention.Policy{Last: 1}
	now := first.AddDate(0, 0, 5)
	decided, err := decide(ctx, r, vm, keep, now)
	if err != nil || len(decided) != 3 || !decided[0].keep || decided[1].keep || decided[2].keep {
		t.Fatalf("%+v, %v", decided, err)
	}
	if _, err := decide(ctx, r, vm, keep, first); !errors.Is(err, retention.ErrClock) {
		t.Errorf("this machine's clock is behind: %v", err)
	}
	make(first.Add(time.Hour))
	if _, err := decide(ctx, r, vm, keep, now); !errors.Is(err, retention.ErrClock) {
		t.Errorf("the clock was set back between two backups: %v", err)
	}
}
