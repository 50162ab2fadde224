package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"syscall"

	"hikae/repo/internal/fsx"
)

// pinLine says in a session's log that it reads only.
const pinLine = "reader"

// Pin registers a reader: until the Closer is closed, or the process ends, nobody
// deletes a pack that was there when Pin returned, except those condemned before
// already. A reader of generations that stay needs no pin, for what is moved is found;
// a pin is for generations that somebody may forget meanwhile, such as those of a
// mount. A pin that is held for ever keeps space from being freed for ever: take a
// new one and close the old one now and then.
//
// Closing it fails where its two small files cannot be removed, fs.ErrPermission
// if nothing can be: they stay until somebody who may removes them, as the next
// session of such a one does by itself.
//
// On storage that takes no writes there is nothing to register with; Pin then returns
// a Closer that does nothing, and no error.
func (r *Repository) Pin(ctx context.Context) (io.Closer, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	p, err := r.pin()
	switch {
	case errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission):
		r.log.Debug("the storage takes no writes, so this reader is not registered", "error", err)
		return &pin{}, nil
	case err != nil:
		return nil, fmt.Errorf("register as a reader: %w", storageError(r.fs, err))
	}
	return p, nil
}

func (r *Repository) pin() (*pin, error) {
	if _, err := r.fs.Stat(sessionsDir); errors.Is(err, fs.ErrNotExist) {
		// Copies of a repository may lack its empty directories.
		if err := fsx.MakeDir(r.fs, sessionsDir); err != nil {
			return nil, err
		}
	}
	f, err := r.newSessionFile()
	if err != nil {
		return nil, err
	}
	if err := f.line(pinLine); err != nil {
		f.end()
		return nil, err
	}
	return &pin{file: f}, nil
}

type pin struct {
	once sync.Once
	file *sessionFile
	err  error
}

// Close ends the registration, whatever it returns. It may be called more than once.
func (p *pin) Close() error {
	p.once.Do(func() {
		if p.file != nil {
			p.err = p.file.leave()
		}
	})
	return p.err
}
