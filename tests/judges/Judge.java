import java.io.*;
import java.nio.file.*;
import java.security.*;
import java.security.cert.*;
import java.util.*;

/** Judges each folder given as argument with the JDK's PKIX algorithm, revocation by CRL on; prints one line per leaf. */
public class Judge {
    public static void main(String[] folders) throws Exception {
        CertificateFactory factory = CertificateFactory.getInstance("X.509");
        for (String name : folders) {
            Path folder = Paths.get(name);
            // Leaves of all profiles: chain and CRLs stand above.
            boolean profiles = folder.endsWith("profiles");
            Path leaves = folder;
            if (profiles) folder = folder.getParent();
            X509Certificate root = certificate(factory, folder.resolve("root.pem"));
            X509Certificate issuing = certificate(factory, folder.resolve("issuing.pem"));
            List<Object> crls = new ArrayList<>();
            for (String file : List.of("root.crl.pem", profiles ? "issuing-revoked.crl.pem" : "issuing.crl.pem"))
                try (InputStream in = Files.newInputStream(folder.resolve(file))) { crls.add(factory.generateCRL(in)); }
            List<String> files = new ArrayList<>(List.of("good", "revoked"));
            if (profiles)
                try (var listed = Files.list(leaves)) {
                    files = listed.map(file -> file.getFileName().toString().replace(".pem", "")).sorted().toList();
                }
            for (String leaf : files) {
                PKIXParameters parameters = new PKIXParameters(Set.of(new TrustAnchor(root, null)));
                parameters.setRevocationEnabled(true);
                parameters.addCertStore(CertStore.getInstance("Collection", new CollectionCertStoreParameters(crls)));
                CertPath path = factory.generateCertPath(List.of(certificate(factory, leaves.resolve(leaf + ".pem")), issuing));
                String verdict;
                try {
                    CertPathValidator.getInstance("PKIX").validate(path, parameters);
                    verdict = "accepted";
                } catch (CertPathValidatorException error) {
                    verdict = "refused " + error.getReason() + " " + error.getMessage();
                }
                System.out.println(leaves + "\t" + leaf + "\t" + verdict);
            }
            if (profiles) continue;
            KeyStore store = KeyStore.getInstance("PKCS12");
            String verdict;
            try (InputStream in = Files.newInputStream(folder.resolve("good.p12"))) {
                store.load(in, "judges".toCharArray());
                Key key = store.getKey("good", "judges".toCharArray());
                verdict = key != null && store.getCertificateChain("good").length == 2 ? "accepted" : "refused no entry";
            } catch (IOException | GeneralSecurityException error) {
                verdict = "refused " + error;
            }
            System.out.println(folder + "\tp12\t" + verdict);
        }
    }

    static X509Certificate certificate(CertificateFactory factory, Path path) throws Exception {
        try (InputStream in = Files.newInputStream(path)) { return (X509Certificate) factory.generateCertificate(in); }
    }
}
