//! What each error code means and what to do about it.

use mesh_proto::v1::ErrorCode;

/// One entry of `meshctl explain`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Text {
    pub(super) title: &'static str,
    /// What it means and what has or has not happened.
    pub(super) means: &'static str,
    pub(super) next: &'static str,
}

/// The text of a code; a match without a default, so that a new code without a text does not compile.
pub(super) const fn text(code: ErrorCode) -> Text {
    let (title, means, next) = match code {
        ErrorCode::Unspecified => (
            "an error without a code",
            "The other side gave no code; it may be older or newer than this meshctl.",
            "Compare `meshctl --version` and `meshd --version`, then look at the daemon's log.",
        ),
        ErrorCode::StateInUse => (
            "the state directory is in use",
            "Another meshd holds the lock of this state directory. Two writers would destroy it, so the second one stops and the first is not touched.",
            "Stop the other one, or give each role a directory of its own with --state-dir.",
        ),
        ErrorCode::StateNotFound => (
            "a file or directory is missing",
            "A path that was named, or the state directory of this role, does not exist.",
            "Check the path. A new controller is made with `meshd controller init`, a new node by `meshctl enroll`.",
        ),
        ErrorCode::StatePermissions => (
            "permissions are too open or too tight",
            "Files that hold keys must be readable by their owner alone (0600, folders 0700), and by us.",
            "`chmod 600 FILE`, `chmod 700 FOLDER`, or run as the user they belong to.",
        ),
        ErrorCode::StateReadOnly => (
            "the file system is read-only",
            "Nothing can be saved, so nothing is acknowledged.",
            "Mount it read-write, or choose another --state-dir.",
        ),
        ErrorCode::StateNewerVersion => (
            "the state was written by a newer meshd",
            "An older program could misread what a newer one wrote, so it refuses and changes nothing.",
            "Install the version that wrote it, or a newer one.",
        ),
        ErrorCode::StateCorrupt => (
            "a file of ours is damaged",
            "A checksum, a hash or the format of a file does not hold. The error names the file or record; nothing was changed.",
            "Restore it from a backup; for a context file run `meshctl login` again.",
        ),
        ErrorCode::StateExists => (
            "there is a mesh in this directory already",
            "`controller init` never overwrites a certificate authority.",
            "Use another --state-dir, or start the one that is there with `meshd controller run`.",
        ),
        ErrorCode::PortInUse => (
            "the port is in use",
            "Another program listens on the address and port that was configured.",
            "`ss -tulpn` shows which; stop it or choose another port with --listen or --wg-port.",
        ),
        ErrorCode::TunMissing => (
            "the kernel has no TUN device",
            "The overlay interface needs /dev/net/tun.",
            "`modprobe tun`; in a container start it with `--device /dev/net/tun`.",
        ),
        ErrorCode::TunDenied => (
            "this process may not make a TUN device",
            "Making the overlay interface needs CAP_NET_ADMIN and the right to open /dev/net/tun.",
            "Run as root, use the systemd unit that comes with meshd, or give the container NET_ADMIN.",
        ),
        ErrorCode::ConfigInvalid => (
            "the configuration is not valid",
            "A key is unknown, or a value is not what the key takes. Nothing was started.",
            "The error names file and key; correct it and start again.",
        ),
        ErrorCode::PassphraseMissing => (
            "a passphrase is needed",
            "The CA's keys are sealed and nothing unseals them: no terminal to ask on, no file, no credential.",
            "Give --passphrase-file, or choose with `--unlock` at init how keys are unsealed.",
        ),
        ErrorCode::PassphraseWrong => (
            "the passphrase is wrong",
            "The CA's keys did not unseal. Nothing was signed.",
            "Try again; the passphrase is the one given to `controller init`.",
        ),
        ErrorCode::DiskFull => (
            "the disk is full",
            "The change could not be saved, so it was refused as a whole. What was acknowledged before is safe.",
            "Make room; no repair is needed.",
        ),
        ErrorCode::ClockOff => (
            "the clocks differ too much",
            "This machine's clock and the controller's are further apart than the 15 minutes that everything signed tolerates.",
            "Start a time service (chrony, systemd-timesyncd) on the machine that is wrong.",
        ),
        ErrorCode::InterfaceBusy => (
            "the interface name is taken",
            "An interface of that name exists and is not ours.",
            "Choose another name with --interface.",
        ),
        ErrorCode::FirewallUnavailable => (
            "nftables cannot be used",
            "The receiving node enforces policy with nftables. Without it, it lets nothing in rather than everything.",
            "Install nftables (`apt install nftables`) and check that the kernel has nf_tables.",
        ),
        ErrorCode::NamespacesDenied => (
            "the kernel denies namespaces",
            "The demo builds its network in private namespaces, which this machine does not allow this user.",
            "Run as root, or allow them: `sysctl -w kernel.unprivileged_userns_clone=1` or `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`, whichever exists.",
        ),
        ErrorCode::KernelBackendMissing => (
            "the kernel has no WireGuard",
            "`--backend kernel` was asked for, and this kernel has no module `wireguard`, or does not let this process use it.",
            "`modprobe wireguard`; install a kernel that has it (Linux 5.6 or later, `apt install linux-image-amd64`); or use --backend auto or userspace: they speak the same protocol.",
        ),
        ErrorCode::ControllerUnreachable => (
            "the controller cannot be reached",
            "No connection to the controller could be made. The mesh goes on without it until the leases end.",
            "Check that it runs, its address and the firewall on its port, then try again.",
        ),
        ErrorCode::DaemonUnreachable => (
            "meshd cannot be reached on this machine",
            "There is no answer on its local socket.",
            "`systemctl status meshd-node`, or start it with `meshd node run`; name another socket with --socket.",
        ),
        ErrorCode::TimedOut => (
            "no answer in time",
            "The other side is there but did not answer within the limit.",
            "Try again, or allow more with --timeout.",
        ),
        ErrorCode::ControllerNotTrusted => (
            "this is not our controller",
            "What answered has no certificate of a controller under our root. Nothing was sent to it.",
            "Check the address; on the controller compare `meshctl ca fingerprint`.",
        ),
        ErrorCode::PeerUnreachable => (
            "the node does not answer",
            "No packet came back through the tunnel: the node is off, cut off, revoked, or policy does not allow it.",
            "`meshctl status` shows path, handshake and lease; `meshctl doctor` on both ends looks for causes.",
        ),
        ErrorCode::Denied => (
            "you may not do this",
            "Your role, or this node's identity, does not include it.",
            "Ask an admin; `meshctl operator ls` shows the roles.",
        ),
        ErrorCode::IdentityExpired => (
            "the identity has expired",
            "The certificate ended before it was renewed.",
            "A node gets a new one by itself within 30 days; an operator runs `meshctl login` with a new token.",
        ),
        ErrorCode::IdentityRevoked => (
            "the identity is revoked",
            "An operator revoked this certificate or node. It cannot come back by itself.",
            "If that was a mistake: a new token, and enroll or log in again with new keys.",
        ),
        ErrorCode::IdentityUnknown => (
            "the controller does not know this identity",
            "The certificate is under our root but not in the controller's journal: another controller, or an old backup.",
            "Check which controller this is; enroll or log in again.",
        ),
        ErrorCode::NotEnrolled => (
            "no identity yet",
            "This machine, or you as an operator, has no identity in the mesh.",
            "`meshctl enroll TOKEN` for a node, `meshctl login URL` for an operator.",
        ),
        ErrorCode::TokenInvalid => (
            "the token is not valid",
            "It is cut short, damaged, for another purpose, or its secret is wrong.",
            "Copy the whole token, from `mesh1_` to its end, or create a new one with `meshctl token create`.",
        ),
        ErrorCode::TokenExpired => (
            "the token has expired",
            "Tokens are good for one hour unless --ttl says more.",
            "Create a new one with `meshctl token create`.",
        ),
        ErrorCode::TokenUsed => (
            "the token has been used",
            "It was good for a number of nodes and they have joined. If you did not use it, somebody else did.",
            "Create a new one. If it was not you: `meshctl audit log` shows who joined, `meshctl node revoke` cuts it off.",
        ),
        ErrorCode::TokenRevoked => (
            "the token was revoked",
            "An operator took it back, or the node it had made was revoked.",
            "Create a new one with `meshctl token create`.",
        ),
        ErrorCode::TokenAnswerGone => (
            "the token was created before, and its secret is gone",
            "The same request was made before the controller was restarted. The controller keeps only a hash of a token's secret, so it cannot give the same answer again.",
            "`meshctl token revoke ID` ends the token of the first answer; then create another.",
        ),
        ErrorCode::ImportRefused => (
            "the CA cannot be taken over",
            "Its files cannot be read, do not belong together, or hold a CA that strict verifiers refuse: ended, no CA, a wrong key usage, a weak key, a root without a CRL. Nothing was made.",
            "The error names the fault. Issue the CA anew without it, or let `meshd controller init` make a new one.",
        ),
        ErrorCode::ImportName => (
            "the CA's name cannot be reproduced",
            "What a CA signs names its issuer byte for byte (RFC 5280 §4.1.2.4). This CA's name has an attribute twice (as in DC=example,DC=com), or a text type of the last century, which meshd would write another way, and strict verifiers would find no path. Nothing was made.",
            "Let that CA sign an issuing CA for meshd whose name has each attribute once, and import that with --import-issuer. The root's own name does not matter then.",
        ),
        ErrorCode::ImportPassphrase => (
            "the imported key's passphrase is missing or wrong",
            "The key or PKCS #12 file is encrypted. Passphrases are never taken from the command line, where other users can see them. Nothing was made.",
            "Put the passphrase into the first line of a file and give --import-passphrase-file FILE.",
        ),
        ErrorCode::TokenUnavailable => (
            "the hardware token with the CA's key cannot be used",
            "Its PKCS #11 module cannot be loaded, no token has the label, the key is not in it, it was taken out, or it answered with something that is no signature. Nothing was signed.",
            "Plug the token in and check --key-store. After a token was out, restart the controller.",
        ),
        ErrorCode::PinWrong => (
            "the hardware token refuses the PIN",
            "The PIN is wrong, or locked after too many wrong ones. Nothing was signed.",
            "Check the PIN file. A locked PIN is reset with the security officer's PIN and the vendor's tool.",
        ),
        ErrorCode::PinMissing => (
            "no PIN for the hardware token",
            "The CA's key is in a token, which signs only after its PIN. PINs are never taken from the command line.",
            "Give --pin-file, MESH_PIN_FILE, the systemd credential `mesh-pin`, or pin-source in --key-store.",
        ),
        ErrorCode::SealedKeyCost => (
            "a CA key file was made easier to guess",
            "The header of the sealed key asks for less work (or far more) for each guess of the passphrase than meshd ever writes. Somebody changed the file. It is refused before the passphrase is used, and nothing was signed.",
            "Put the file back from a backup, find out who can write to the state directory, and consider a new passphrase.",
        ),
        ErrorCode::BackupRefused => (
            "the backup cannot be used",
            "It is no backup of a controller, was cut off, or its parts contradict each other. Nothing was made.",
            "Take another copy or an older backup.",
        ),
        ErrorCode::Pkcs12Refused => (
            "the PKCS #12 file cannot be made",
            "The file with its passphrase cannot be read, its first line is empty or no UTF-8, or the passphrase has a character that PKCS #12 does not know. The pair in the folder stays as it was.",
            "Put the passphrase into the first line of a file that meshd can read, then issue or renew again.",
        ),
        ErrorCode::TokenNameMismatch => (
            "the token is for another name",
            "It was created with --name, and lets in only a node of that name. It has not been used up.",
            "Join with `meshctl enroll --name NAME`, or create a token without a name.",
        ),
        ErrorCode::TokenNotFound => {
            ("there is no such token", "No token has that id.", "Take the id from `meshctl token ls`.")
        }
        ErrorCode::AlreadyEnrolled => (
            "this machine is in a mesh already",
            "It has an identity, which enrolling anew would destroy.",
            "`meshctl status` shows which; `meshctl leave` gives it up first.",
        ),
        ErrorCode::EnrollmentRefused => (
            "the enrollment was refused",
            "An operator did not approve it, or it was taken back.",
            "Ask the operator, then enroll with a new token.",
        ),
        ErrorCode::RootMismatch => (
            "the controller's root key does not match the token",
            "The token names the SHA-256 of the root's public key, and what answered showed another. Nothing was sent, so the token is still secret and unused.",
            "On the controller run `meshctl ca fingerprint` and compare; a controller that was set up anew needs new tokens.",
        ),
        ErrorCode::ApprovalPending => (
            "an operator must approve",
            "The token was created with --require-approval.",
            "On the controller `meshctl node approve NAME`, after comparing the key's fingerprint.",
        ),
        ErrorCode::ResumeWindowPassed => (
            "away for too long",
            "A node may come back with an expired certificate for 30 days, and that is over.",
            "Enroll it again with a new token.",
        ),
        ErrorCode::NameInvalid => (
            "the name is not valid",
            "Names are DNS labels: a to z, 0 to 9 and `-`, 63 characters at most, no `-` at either end.",
            "Choose another name.",
        ),
        ErrorCode::NameTaken => (
            "the name is taken",
            "A name has one owner: a node, a grant or a reserved word.",
            "Choose another name, or `meshctl node rm` the node that has it.",
        ),
        ErrorCode::NameReserved => (
            "the name is reserved",
            "Some names mean something to the mesh or to browsers: controller, ca, crl, ocsp, acme, pki, wpad, localhost and others.",
            "Choose another name.",
        ),
        ErrorCode::NameOutsideDomain => (
            "the name is outside the mesh's domain",
            "The CA certifies names below its own domain only.",
            "Use a name that ends in the domain that `meshctl ca show` shows.",
        ),
        ErrorCode::NameNotGranted => (
            "the node has no right to this name",
            "A node may certify its own name and names below it; others need a grant.",
            "Add `[[grant]] names = [\"NAME\"] to = [\"node:NODE\"]` to the policy and `meshctl policy apply` it.",
        ),
        ErrorCode::NameWildcard => (
            "wildcards are not issued",
            "A wildcard would speak for names of other nodes.",
            "List the names; one certificate takes several.",
        ),
        ErrorCode::CsrInvalid => (
            "the CSR cannot be read",
            "It is neither DER nor one PEM block of a certificate request, or asks for something no leaf may have.",
            "Make one with `openssl req -new`, with names only.",
        ),
        ErrorCode::CsrSignature => (
            "the CSR's signature is wrong",
            "The CSR is not signed by the key in it, so its maker may not hold that key.",
            "Make it anew with the right key.",
        ),
        ErrorCode::KeyWeak => (
            "the key is too weak or of a kind we do not take",
            "P-256, P-384, Ed25519 and RSA from 2048 bits are taken.",
            "Make a new key, best P-256.",
        ),
        ErrorCode::CsrForeignName => (
            "the CSR asks for names that were not asked for",
            "Names come from the command line and the policy; a CSR that asks for others is refused rather than cut.",
            "Name them all on the command line, or leave them out of the CSR.",
        ),
        ErrorCode::CsrNotALeaf => (
            "the CSR asks to be a CA",
            "Certificates that may sign others are made by `meshd controller init` alone.",
            "Make a CSR without CA:TRUE and without keyCertSign.",
        ),
        ErrorCode::TooLarge => (
            "too large",
            "A request, file or CSR is longer than anything honest needs.",
            "The error says the limit.",
        ),
        ErrorCode::KeyInUse => {
            ("the key belongs to another identity", "One key speaks for one identity.", "Make a new key.")
        }
        ErrorCode::KeyRevoked => (
            "the key is revoked",
            "A key that was revoked does not come back, under no name.",
            "Make a new key.",
        ),
        ErrorCode::CertificateNotFound => (
            "there is no such certificate",
            "No certificate has that serial number, name or key.",
            "`meshctl cert ls` shows the live ones, with --all the others.",
        ),
        ErrorCode::NodeIdentity => (
            "this is a node's identity",
            "Revoking it would leave a node without an identity but with its peers.",
            "`meshctl node revoke NAME` takes away all of it.",
        ),
        ErrorCode::DirectoryNotOurs => (
            "the folder holds files that are not ours",
            "Writing there could destroy somebody's key.",
            "Name an empty or new folder with --out.",
        ),
        ErrorCode::HookFailed => (
            "the reload command failed",
            "After a change the service was told to reload and that failed, so the old pair was put back if it still holds.",
            "Run the command by hand; `meshctl cert ls` shows the problem.",
        ),
        ErrorCode::CertificateInvalid => (
            "the certificate does not hold",
            "It is malformed, ended, revoked, of another root, or does not belong to its key.",
            "The error says which; `meshctl cert issue` makes a new one.",
        ),
        ErrorCode::NameStopped => (
            "certificates of this name were stopped",
            "An operator revoked this name with `cert revoke`; nobody renews it until it is issued again by hand.",
            "`meshctl cert issue NAME` starts it again.",
        ),
        ErrorCode::ProfileUnknown => (
            "no such profile",
            "server, client and peer are built in. Every other name is a profile that policy.toml defines as [profile.NAME]; the policy in force has none of this name. Nothing was issued. A pair that is there stays until it ends.",
            "`meshctl policy show` lists the profiles in force; apply a policy that has it, or issue under another profile.",
        ),
        ErrorCode::ProfileNotGiven => (
            "the profile is not for this node",
            "No [[profile.NAME.names]] of the profile has this node, by name or tag, in its \"to\". What no rule gives is refused. Custom profiles are for nodes: an operator's machine cannot use one.",
            "Tag the node (`meshctl node tag NODE +TAG`), add a rule to the profile, or use another one.",
        ),
        ErrorCode::NameOutsideProfile => (
            "the profile does not give this name",
            "No rule of the profile gives this name or address to this node: neither \"exact\" nor \"below\", nor \"own\" for what is the node's. Names of other nodes, reserved names and names outside the domain are given by no profile.",
            "`meshctl cert issue --dry-run --explain NAME --profile P` shows each name and its rule; change the name or the profile.",
        ),
        ErrorCode::KeyOutsideProfile => (
            "the profile does not allow this type of key",
            "The profile lists the types of keys that it certifies; without a list that is ecdsa-p256 alone.",
            "Choose another with --key-type, or add the type to \"keys\" of the profile.",
        ),
        ErrorCode::LifetimeOutsideProfile => (
            "the profile does not allow so long a life",
            "More was asked for than the profile's lifetime_max.",
            "Leave --ttl out, ask for less, or raise lifetime_max (at most 90d; 10d for short-lived).",
        ),
        ErrorCode::ServiceOutsideProfile => (
            "the profile does not give this SPIFFE ID",
            "A certificate of kind peer carries spiffe://DOMAIN/service/NODE/NAME. NODE is always the node itself; NAME is the first label of the pair's first name, and no \"services\" of a rule for this node has it.",
            "Put another name first, or add it to \"services\" of the profile; \"*\" is every name.",
        ),
        ErrorCode::ProfileChanged => (
            "the profile was changed meanwhile",
            "A new policy came into force between the making of the certificate and its record. The certificate was dropped.",
            "Ask again; a node does so by itself.",
        ),
        ErrorCode::NodeNotFound => {
            ("there is no such node", "No node has that name.", "`meshctl node ls` shows all.")
        }
        ErrorCode::NodeRevoked => (
            "the node is revoked",
            "Its identity was taken away; it cannot be changed, renewed or approved.",
            "`meshctl node rm` frees its name; then enroll it with a new token.",
        ),
        ErrorCode::NodePending => (
            "the node waits for approval",
            "It has no identity yet.",
            "`meshctl node approve NAME`, after comparing the key's fingerprint.",
        ),
        ErrorCode::AddressesExhausted => (
            "no address is free",
            "Every address of the pool belongs to a node or to a certificate that has not ended.",
            "Remove nodes that are gone; addresses come back when their certificates end.",
        ),
        ErrorCode::TagInvalid => (
            "the tag is not valid",
            "Tags have 1 to 32 characters of a to z, 0 to 9 and `-`.",
            "Choose another tag.",
        ),
        ErrorCode::NotAllReached => (
            "not every node was reached",
            "The change stands; nodes that are off hear of it when they come back, and drop what was revoked when its lease ends.",
            "The answer lists them with the end of their lease.",
        ),
        ErrorCode::PolicyInvalid => (
            "the policy is not valid",
            "The file cannot be read as a policy, or names what does not exist. The old policy stays in force.",
            "`meshctl policy check FILE` lists every problem.",
        ),
        ErrorCode::OperatorNotFound => {
            ("there is no such operator", "No operator has that name.", "`meshctl operator ls` shows all.")
        }
        ErrorCode::OperatorExists => (
            "there is an operator of that name",
            "Names are not given twice.",
            "Choose another name, or `meshctl operator rm NAME` first.",
        ),
        ErrorCode::LastAdmin => (
            "this is the last admin",
            "Without an admin only root on the controller could change anything.",
            "Add another admin first.",
        ),
        ErrorCode::RotationRunning => (
            "a change of authorities is under way",
            "One rotation runs at a time, and a root is not taken offline during one. Nothing was changed.",
            "`meshctl ca rotate status` shows where it stands; `advance` or `abort` end it.",
        ),
        ErrorCode::RotationNone => (
            "no change of authorities is under way",
            "There is nothing to advance or to take back. An authority that was dropped is trusted by nobody any more and does not return.",
            "`meshctl ca rotate start` begins a rotation.",
        ),
        ErrorCode::RotationWaits => (
            "the rotation waits for somebody",
            "A step is taken only when every node with a live identity has taken up what the step before announced, and when no certificate in use would fail after it. Nothing was changed.",
            "`meshctl ca rotate status` names nodes and certificates. Nodes that are away for longer than 72 h are not waited for; those that are gone for good: `meshctl node revoke`. Certificates that nobody renews: `meshctl cert revoke`, or wait for their end.",
        ),
        ErrorCode::RootSealed => (
            "the root's key is offline",
            "It was exported and removed from this controller, so the controller cannot sign with it. Nothing was signed.",
            "`meshctl ca rotate start --request-out FILE`, then `meshctl ca sign-issuer` where the key is, then `meshctl ca rotate start --response FILE`.",
        ),
        ErrorCode::RotationRefused => (
            "this step is refused",
            "It would leave a certificate that somebody uses without a path to a root that everybody trusts, or does not fit where the rotation stands. Nothing was changed.",
            "Look at `meshctl ca rotate status`, do what it says, then try again.",
        ),
        ErrorCode::CaKeyMismatch => (
            "a CA key file is not the key it should be",
            "Its name, its purpose or its public key is another's: files were swapped, or restored from elsewhere. Nothing was signed.",
            "Put the right file back from a backup. `meshctl ca show` names the keys by fingerprint.",
        ),
        ErrorCode::CeremonyMismatch => (
            "a file of the root's ceremony does not fit",
            "Request, root and answer carry fingerprints of each other, and one of them is another's, changed, or older than what was taken already. Nothing was signed or changed.",
            "Compare the fingerprints that each step printed. If in doubt make a new request with `meshctl ca rotate start --request-out FILE`.",
        ),
        ErrorCode::Internal => (
            "something failed that should not",
            "The error is ours; the daemon's log has the details.",
            "Try again; if it stays, report it with the log and `meshctl --version`.",
        ),
        ErrorCode::ClockJump => (
            "the controller's clock jumped",
            "It moved by more than ten minutes. Until an operator has confirmed the time, nothing that depends on it is decided.",
            "Check the controller's clock, then run `meshctl clock confirm`.",
        ),
        ErrorCode::Usage => (
            "the command line is wrong",
            "A command, option or value is unknown, missing or does not fit.",
            "`meshctl COMMAND --help` shows what there is.",
        ),
        ErrorCode::Overloaded => (
            "too much at once",
            "A limit on connections or requests was reached. Nothing was done.",
            "Try again in a moment.",
        ),
    };
    Text { title, means, next }
}
