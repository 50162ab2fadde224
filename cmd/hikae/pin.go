package main

import (
	"context"

	"hikae/cmd/hikae/internal/app"
	"hikae/repo"
)

// pin keeps what a command reads from being pruned until the function it returns
// is called. A repository without room for that, or whose storage fails, may still
// be read: that is when one needs it.
func pin(ctx context.Context, a *app.App, r *repo.Repository) (unpin func()) {
	p, err := r.Pin(ctx)
	if err != nil {
		if ctx.Err() == nil {
			a.UI.Warnf("%v; reading all the same: do not prune meanwhile", err)
		}
		return func() {}
	}
	return func() {
		if err := p.Close(); err != nil {
			a.Logger().Debug("end of the registration as a reader", "error", err)
		}
	}
}
