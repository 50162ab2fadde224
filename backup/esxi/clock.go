package esxi

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/vmware/govmomi/vim25/methods"
)

// Time is what the host's clock shows now, to the second or better, as late as the
// answer takes to come.
func (h *Host) Time(ctx context.Context) (time.Time, error) {
	if h.session != nil {
		now, err := methods.GetCurrentTime(ctx, h.session)
		if err != nil {
			return time.Time{}, h.explain(ctx, "ask for the time", err)
		}
		return now.UTC(), nil
	}
	out, err := h.shell.words(ctx, true, "date", "-u", "+%s")
	if err != nil {
		return time.Time{}, h.explain(ctx, "ask for the time", err)
	}
	seconds, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("%s: date prints %q, which is no time", h.name, strings.TrimSpace(out))
	}
	return time.Unix(seconds, 0).UTC(), nil
}
