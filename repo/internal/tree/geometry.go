package tree

import "hikae/repo/internal/block"

// Fan is how many entries a node has: a level of the tree is one byte of the
// block number.
const Fan = 256

// NodeSize is the plaintext size of every node in bytes.
const NodeSize = Fan * block.Size

// MaxLevels is the deepest tree a disk of this format can have.
const MaxLevels = 6

// MaxCapacity is the largest disk, in bytes: 4 EiB, far above what ESXi makes,
// low enough that no sum of offsets overflows.
const MaxCapacity = 1 << 62

// Blocks returns how many blocks a disk of so many bytes has, the last one
// perhaps partly beyond its end.
func Blocks(capacity int64, blockSize int) int64 {
	return (capacity + int64(blockSize) - 1) / int64(blockSize)
}

// Levels returns the depth of the tree over n blocks: the smallest number, at
// least one, of base 256 digits that can name every block.
func Levels(n int64) int {
	levels := 1
	for span := int64(Fan); span < n && levels < MaxLevels; span *= Fan {
		levels++
	}
	return levels
}

// Span returns how many blocks one entry of a node covers; the node's level is
// counted from the leaves, which are level one and whose entries cover one.
func Span(level int) int64 {
	return int64(1) << (8 * (level - 1))
}
