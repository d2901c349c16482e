//! Files of any length sealed under a passphrase: a header, then chunks that are encrypted and numbered one by one.
//!
//! ```text
//! magic "meshbak" | version u8 = 1 | memory KiB u32 | passes u32 | lanes u32 | salt [16] | nonce prefix [19]
//! chunks of 64 KiB and a tag of 16 octets; the last is shorter or as long, and says that it is the last
//! ```
//!
//! Integers are big endian. Argon2id makes the key; the chunks are XChaCha20-Poly1305 in the STREAM construction (Hoang,
//! Reyhanitabar, Rogaway, Vizár: Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance), so that none can be
//! left out, moved or cut off. The header is authenticated with each chunk.

use chacha20poly1305::XChaCha20Poly1305;
use chacha20poly1305::aead::Payload;
use chacha20poly1305::aead::stream::{DecryptorBE32, EncryptorBE32};
use zeroize::Zeroizing;

use crate::seal::{KdfParams, SealError, passphrase_cipher};

/// Octets of a header.
pub const ARCHIVE_HEADER_BYTES: usize = 8 + 12 + SALT_BYTES + PREFIX_BYTES;
/// Octets of every chunk but the last before it is encrypted: 64 KiB.
pub const ARCHIVE_CHUNK_BYTES: usize = 64 * 1024;
/// What encryption adds to a chunk.
pub const ARCHIVE_TAG_BYTES: usize = 16;

const MAGIC: &[u8; 7] = b"meshbak";
const VERSION: u8 = 1;
const SALT_BYTES: usize = 16;
const PREFIX_BYTES: usize = 19;

/// Writes a sealed file.
pub struct ArchiveSealer {
    header: [u8; ARCHIVE_HEADER_BYTES],
    stream: EncryptorBE32<XChaCha20Poly1305>,
}

impl ArchiveSealer {
    /// Blocks for as long as `cost` asks (about 0.1 s with the default).
    ///
    /// # Errors
    /// [`SealError::EmptyPassphrase`], [`SealError::Cost`].
    pub fn new(
        passphrase: &[u8],
        cost: KdfParams,
        rng: &mut dyn FnMut(&mut [u8]),
    ) -> Result<Self, SealError> {
        if passphrase.is_empty() {
            return Err(SealError::EmptyPassphrase);
        }
        cost.check()?;
        let (mut salt, mut prefix) = ([0; SALT_BYTES], [0; PREFIX_BYTES]);
        rng(&mut salt);
        rng(&mut prefix);
        let mut header = [0; ARCHIVE_HEADER_BYTES];
        let numbers = [cost.memory_kib, cost.passes, cost.lanes].map(u32::to_be_bytes).concat();
        header.copy_from_slice(&[MAGIC.as_slice(), &[VERSION], &numbers, &salt, &prefix].concat());
        let cipher = passphrase_cipher(passphrase, cost, &salt)?;
        Ok(Self { header, stream: EncryptorBE32::from_aead(cipher, prefix.as_slice().into()) })
    }

    /// What the file begins with.
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// The next chunk, of [`ARCHIVE_CHUNK_BYTES`] octets.
    pub fn chunk(&mut self, plain: &[u8]) -> Result<Vec<u8>, SealError> {
        debug_assert_eq!(plain.len(), ARCHIVE_CHUNK_BYTES);
        let payload = Payload { msg: plain, aad: &self.header };
        self.stream.encrypt_next(payload).map_err(|_| SealError::TooLarge)
    }

    /// The last chunk, of at most [`ARCHIVE_CHUNK_BYTES`] octets.
    pub fn last(self, plain: &[u8]) -> Result<Vec<u8>, SealError> {
        let payload = Payload { msg: plain, aad: &self.header };
        self.stream.encrypt_last(payload).map_err(|_| SealError::TooLarge)
    }
}

impl std::fmt::Debug for ArchiveSealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ArchiveSealer").finish_non_exhaustive()
    }
}

/// Reads a sealed file.
pub struct ArchiveOpener {
    header: [u8; ARCHIVE_HEADER_BYTES],
    stream: DecryptorBE32<XChaCha20Poly1305>,
}

impl ArchiveOpener {
    /// Blocks for as long as the cost in the header asks.
    ///
    /// # Errors
    /// [`SealError::Malformed`], [`SealError::Version`]; [`SealError::Cost`] if it lies outside [`KdfParams::FLOOR`] and
    /// [`KdfParams::CEILING`], before any work is done. A wrong passphrase shows with the first chunk.
    pub fn new(header: &[u8], passphrase: &[u8]) -> Result<Self, SealError> {
        let header: [u8; ARCHIVE_HEADER_BYTES] = header.try_into().map_err(|_| SealError::Malformed)?;
        let malformed = SealError::Malformed;
        let rest = header.strip_prefix(MAGIC).ok_or(malformed.clone())?;
        let ([version], rest) = rest.split_first_chunk().ok_or(malformed.clone())?;
        if *version != VERSION {
            return Err(SealError::Version(*version));
        }
        let (memory, rest) = rest.split_first_chunk().ok_or(malformed.clone())?;
        let (passes, rest) = rest.split_first_chunk().ok_or(malformed.clone())?;
        let (lanes, rest) = rest.split_first_chunk().ok_or(malformed.clone())?;
        let (salt, prefix) = rest.split_first_chunk::<SALT_BYTES>().ok_or(malformed)?;
        let cost = KdfParams {
            memory_kib: u32::from_be_bytes(*memory),
            passes: u32::from_be_bytes(*passes),
            lanes: u32::from_be_bytes(*lanes),
        };
        cost.check()?;
        let cipher = passphrase_cipher(passphrase, cost, salt)?;
        Ok(Self { stream: DecryptorBE32::from_aead(cipher, prefix.into()), header })
    }

    /// The octets of the next chunk, which is not the last.
    ///
    /// # Errors
    /// [`SealError::WrongPassphrase`] also for every change, and for the last chunk of a file.
    pub fn chunk(&mut self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let payload = Payload { msg: sealed, aad: &self.header };
        self.stream.decrypt_next(payload).map(Zeroizing::new).map_err(|_| SealError::WrongPassphrase)
    }

    /// The octets of the last chunk.
    ///
    /// # Errors
    /// [`SealError::WrongPassphrase`] also for every change, and if the file was cut off here.
    pub fn last(self, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let payload = Payload { msg: sealed, aad: &self.header };
        self.stream.decrypt_last(payload).map(Zeroizing::new).map_err(|_| SealError::WrongPassphrase)
    }
}

impl std::fmt::Debug for ArchiveOpener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ArchiveOpener").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter() -> impl FnMut(&mut [u8]) {
        let mut next = 0_u8;
        move |bytes: &mut [u8]| bytes.iter_mut().for_each(|b| (*b, next) = (next, next.wrapping_add(1)))
    }

    /// Header and three chunks.
    fn sealed() -> (Vec<u8>, Vec<Vec<u8>>) {
        let mut sealer = ArchiveSealer::new(b"correct horse", KdfParams::FLOOR, &mut counter()).unwrap();
        let header = sealer.header().to_vec();
        let first = sealer.chunk(&vec![1; ARCHIVE_CHUNK_BYTES]).unwrap();
        let second = sealer.chunk(&vec![2; ARCHIVE_CHUNK_BYTES]).unwrap();
        (header, vec![first, second, sealer.last(b"the end").unwrap()])
    }

    fn open(header: &[u8], passphrase: &[u8], chunks: &[Vec<u8>]) -> Result<Vec<u8>, SealError> {
        let mut opener = ArchiveOpener::new(header, passphrase)?;
        let (last, before) = chunks.split_last().unwrap();
        let mut plain = Vec::new();
        for chunk in before {
            plain.extend_from_slice(&opener.chunk(chunk)?);
        }
        plain.extend_from_slice(&opener.last(last)?);
        Ok(plain)
    }

    #[test]
    fn the_right_passphrase_opens_all_of_it() {
        let (header, chunks) = sealed();
        assert_eq!(chunks[0].len(), ARCHIVE_CHUNK_BYTES + ARCHIVE_TAG_BYTES);
        let plain = open(&header, b"correct horse", &chunks).unwrap();
        assert_eq!(plain.len(), 2 * ARCHIVE_CHUNK_BYTES + 7);
        assert!(plain.ends_with(b"\x02the end"));
        assert_eq!(open(&header, b"wrong horse", &chunks), Err(SealError::WrongPassphrase));
    }

    #[test]
    fn chunks_cannot_be_changed_moved_left_out_or_cut_off() {
        let (header, chunks) = sealed();
        let [first, second, last] = <[Vec<u8>; 3]>::try_from(chunks).unwrap();
        let mut changed = second.clone();
        changed[77] ^= 1;
        for chunks in [
            vec![first.clone(), changed, last.clone()],
            vec![second.clone(), first.clone(), last.clone()],
            vec![first.clone(), last.clone()],
            vec![first.clone(), second.clone()],
            vec![first.clone(), second.clone(), last.clone(), last.clone()],
        ] {
            assert_eq!(open(&header, b"correct horse", &chunks), Err(SealError::WrongPassphrase));
        }
        // The cost is tried in the next test, as some changes of it cost a gigabyte.
        for at in (0..8).chain(20..ARCHIVE_HEADER_BYTES) {
            let mut header = header.clone();
            header[at] ^= 1;
            let chunks = vec![first.clone(), second.clone(), last.clone()];
            assert!(open(&header, b"correct horse", &chunks).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_header_with_a_cost_out_of_bounds_is_refused_before_any_work() {
        let (header, _) = sealed();
        for (at, value) in [(8, 0xff), (9, 0xff), (10, 0), (15, 1), (15, 200), (19, 0), (19, 99)] {
            let mut header = header.clone();
            header[at] = value;
            let refused = ArchiveOpener::new(&header, b"correct horse").unwrap_err();
            assert!(matches!(refused, SealError::Cost(_)), "byte {at} = {value}: {refused}");
        }
        assert!(matches!(ArchiveOpener::new(&header[1..], b"x"), Err(SealError::Malformed)));
        let empty = ArchiveSealer::new(b"", KdfParams::FLOOR, &mut counter()).unwrap_err();
        assert_eq!(empty, SealError::EmptyPassphrase);
    }
}
