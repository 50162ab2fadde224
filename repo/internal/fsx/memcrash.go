package fsx

import "math/rand/v2"

// Crash ends the life of all handles and locks and throws away a part, chosen by
// rng, of what was not synced. The file system can be used again at once.
func (m *Mem) Crash(rng *rand.Rand) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.life++
	// Half the crashes keep almost nothing or almost all: that is where
	// orderings go wrong that a fair coin would rarely try.
	keep := []float64{0, 0.1, 0.5, 0.9, 1}[rng.IntN(5)]
	kept := map[*nameOp]bool{}
	for _, op := range m.pending {
		if op.after != nil && !kept[op.after] {
			continue
		}
		if rng.Float64() < keep {
			kept[op] = true
			setName(op.dir.safe, op.name, op.node)
		}
	}
	m.pending = nil
	m.used = 0
	m.settle(m.root, rng, map[*memNode]bool{})
	m.unlocked.Broadcast()
}

// settle makes the surviving state below n the current one.
func (m *Mem) settle(n *memNode, rng *rand.Rand, seen map[*memNode]bool) {
	if seen[n] {
		n.links++
		return
	}
	seen[n] = true
	n.links, n.readers, n.writer = 1, 0, false
	if !n.dir {
		n.data = tear(n.data, n.synced, rng)
		n.synced = len(n.data)
		m.used += int64(len(n.data))
		return
	}
	n.now = make(map[string]*memNode, len(n.safe))
	// In a fixed order, so that a seed means the same every time.
	for _, name := range sortedNames(n.safe) {
		c := n.safe[name]
		n.now[name] = c
		m.settle(c, rng, seen)
	}
}

// tear returns what is left of a file of which only the first synced bytes last.
func tear(data []byte, synced int, rng *rand.Rand) []byte {
	const sector = 512
	rest := len(data) - synced
	if rest == 0 {
		return data
	}
	switch rng.IntN(4) {
	case 0:
		return data[:synced:synced]
	case 1:
		return data
	case 2:
		n := synced + rng.IntN(rest+1)
		return data[:n:n]
	}
	// The size went to disk before the bytes did.
	torn := append([]byte(nil), data[:synced+rng.IntN(rest+1)]...)
	for at := synced; at < len(torn); {
		end := min(at/sector*sector+sector, len(torn))
		switch rng.IntN(3) {
		case 0:
			clear(torn[at:end])
		case 1:
			for i := at; i < end; i++ {
				torn[i] = byte(rng.Uint32())
			}
		}
		at = end
	}
	return torn
}
