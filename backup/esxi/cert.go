package esxi

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

// probeTimeout bounds one TCP connect and one TLS handshake.
const probeTimeout = 15 * time.Second

// Certificate shows the certificate at address (host or host:port) by a TLS
// handshake alone: nothing is sent after it and nothing is verified. It is what
// an operator compares with the host's own console before pinning it.
func Certificate(ctx context.Context, address string) (Cert, error) {
	addr, err := hostPort(address)
	if err != nil {
		return Cert{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*probeTimeout)
	defer cancel()
	d := tls.Dialer{
		NetDialer: &net.Dialer{Timeout: probeTimeout},
		// Nothing is believed here: the caller shows the thumbprint to a person.
		Config: &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12},
	}
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return Cert{}, errf(ErrUnreachable, err, "%s cannot be reached: %s", addr, root(err))
	}
	defer conn.Close() //nolint:errcheck // nothing was said on it
	certs := conn.(*tls.Conn).ConnectionState().PeerCertificates
	if len(certs) == 0 {
		return Cert{}, fmt.Errorf("%s shows no certificate", addr)
	}
	return Cert{
		Thumbprint: thumbprint(certs[0].Raw),
		Subject:    certs[0].Subject.String(),
		NotAfter:   certs[0].NotAfter,
	}, nil
}

// thumbprint is the SHA-256 of a certificate as VMware writes it.
func thumbprint(der []byte) string {
	sum := sha256.Sum256(der)
	var b strings.Builder
	for i, c := range sum {
		if i > 0 {
			b.WriteByte(':')
		}
		fmt.Fprintf(&b, "%02X", c)
	}
	return b.String()
}

// parseThumbprint accepts hexadecimal with or without colons or spaces, in
// either case, and gives VMware's notation.
func parseThumbprint(s string) (string, error) {
	bare := strings.NewReplacer(":", "", " ", "", "-", "").Replace(strings.TrimSpace(s))
	raw, err := hex.DecodeString(bare)
	if err != nil || len(raw) != sha256.Size {
		return "", fmt.Errorf("%q is not a SHA-256 thumbprint (64 hexadecimal digits)", s)
	}
	var parts []string
	for _, c := range raw {
		parts = append(parts, fmt.Sprintf("%02X", c))
	}
	return strings.Join(parts, ":"), nil
}

// hostPort completes an address with port 443.
func hostPort(address string) (string, error) { return withPort(address, "443") }

func withPort(address, standard string) (string, error) {
	a := strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(address), "https://"), "/")
	if a == "" {
		return "", errors.New("a host needs an address: a name or IP, with :port unless it is " + standard)
	}
	if strings.ContainsAny(a, "/@?# ") {
		return "", fmt.Errorf("%q is not an address: give a name or IP, with :port unless it is %s", address, standard)
	}
	if host, port, err := net.SplitHostPort(a); err == nil {
		if host == "" || port == "" {
			return "", fmt.Errorf("%q is not an address: give a name or IP, with :port unless it is %s", address, standard)
		}
		return a, nil
	}
	return net.JoinHostPort(strings.Trim(a, "[]"), standard), nil
}

// pinned is a TLS configuration that accepts one certificate and no other. The
// comparison runs in every handshake, resumed ones included, before any request
// is sent, and no authority is asked: a certificate that some authority signed
// is as wrong as any other when it is not the pinned one.
func pinned(name, addr, want string) *tls.Config {
	return &tls.Config{
		InsecureSkipVerify: true, // replaced by VerifyConnection, which always runs
		MinVersion:         tls.VersionTLS12,
		VerifyConnection: func(cs tls.ConnectionState) error {
			if len(cs.PeerCertificates) == 0 {
				return errf(ErrThumbprint, nil, "%s (%s) shows no certificate", name, addr)
			}
			got := thumbprint(cs.PeerCertificates[0].Raw)
			if got == want {
				return nil
			}
			return errf(ErrThumbprint, nil, "%s (%s) shows certificate %s but %s is pinned: either the host has a new certificate "+
				"or something stands between; compare with the host's console, and if it is right set thumbprint = %q "+
				"for this host in the configuration (hikae host remove, then hikae host add --thumbprint)",
				name, addr, got, want, got)
		},
	}
}
