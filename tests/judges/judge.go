// Judges each folder given as argument with Go's crypto/x509: chain, purposes, name, and the CRLs by signature and serial.
package main

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

func block(path string) []byte {
	text, err := os.ReadFile(path)
	if err != nil {
		panic(err)
	}
	found, _ := pem.Decode(text)
	return found.Bytes
}

func certificate(path string) *x509.Certificate {
	parsed, err := x509.ParseCertificate(block(path))
	if err != nil {
		panic(err)
	}
	return parsed
}

func judge(folder, leaf string) error {
	root, issuing := certificate(filepath.Join(folder, "root.pem")), certificate(filepath.Join(folder, "issuing.pem"))
	subject := certificate(filepath.Join(folder, leaf+".pem"))
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	intermediates.AddCert(issuing)
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		options := x509.VerifyOptions{Roots: roots, Intermediates: intermediates, DNSName: "shop.mesh.internal", KeyUsages: []x509.ExtKeyUsage{usage}}
		if _, err := subject.Verify(options); err != nil {
			return err
		}
	}
	return revocation(folder, "issuing.crl.pem", root, issuing, subject)
}

// Whether the root's list names the issuing CA, or the issuing CA's the leaf.
func revocation(folder, list string, root, issuing, subject *x509.Certificate) error {
	for _, pair := range []struct {
		file   string
		issuer *x509.Certificate
		of     *x509.Certificate
	}{{"root.crl.pem", root, issuing}, {list, issuing, subject}} {
		list, err := x509.ParseRevocationList(block(filepath.Join(folder, pair.file)))
		if err != nil {
			return err
		}
		if err := list.CheckSignatureFrom(pair.issuer); err != nil {
			return err
		}
		for _, entry := range list.RevokedCertificateEntries {
			if entry.SerialNumber.Cmp(pair.of.SerialNumber) == 0 {
				return errors.New("revoked")
			}
		}
	}
	return nil
}

// A leaf of the folder `profiles`: good for the purposes its name begins with, and for no other, unless it is revoked.
func judgeProfile(folder, file string) error {
	above := filepath.Dir(folder)
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	root, issuing := certificate(filepath.Join(above, "root.pem")), certificate(filepath.Join(above, "issuing.pem"))
	roots.AddCert(root)
	intermediates.AddCert(issuing)
	subject := certificate(filepath.Join(folder, file))
	parts := strings.SplitN(file, "-", 3)
	uses, host := parts[0], "shop.mesh.internal"
	if parts[1] == "operator" {
		host = ""
	}
	for name, usage := range map[string]x509.ExtKeyUsage{"server": x509.ExtKeyUsageServerAuth, "client": x509.ExtKeyUsageClientAuth} {
		options := x509.VerifyOptions{Roots: roots, Intermediates: intermediates, DNSName: host, KeyUsages: []x509.ExtKeyUsage{usage}}
		_, err := subject.Verify(options)
		may := uses == "both" || uses == name
		if may && err != nil {
			return err
		}
		if !may && err == nil {
			return errors.New("good as " + name)
		}
	}
	if subject.IsCA || subject.KeyUsage != x509.KeyUsageDigitalSignature {
		return errors.New("not a leaf that signs only")
	}
	return revocation(above, "issuing-revoked.crl.pem", root, issuing, subject)
}

func main() {
	for _, folder := range os.Args[1:] {
		if filepath.Base(folder) == "profiles" {
			files, err := os.ReadDir(folder)
			if err != nil {
				panic(err)
			}
			for _, file := range files {
				verdict := "accepted"
				if err := judgeProfile(folder, file.Name()); err != nil {
					verdict = "refused " + err.Error()
				}
				fmt.Printf("%s\t%s\t%s\n", folder, strings.TrimSuffix(file.Name(), ".pem"), verdict)
			}
			continue
		}
		for _, leaf := range []string{"good", "revoked"} {
			verdict := "accepted"
			if err := judge(folder, leaf); err != nil {
				verdict = "refused " + err.Error()
			}
			fmt.Printf("%s\t%s\t%s\n", folder, leaf, verdict)
		}
	}
}
