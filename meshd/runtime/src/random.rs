use rand::rand_core::UnwrapErr;
use rand::rngs::OsRng;
use rand::{CryptoRng, RngCore};

/// The operating system's generator. Cryptographically secure; every key, serial, token and
/// identifier is drawn from it.
///
/// `getrandom(2)` cannot fail once the kernel's pool is seeded; should it ever, the process ends
/// rather than go on with predictable values.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsRandom;

impl RngCore for OsRandom {
    fn next_u32(&mut self) -> u32 {
        UnwrapErr(OsRng).next_u32()
    }

    fn next_u64(&mut self) -> u64 {
        UnwrapErr(OsRng).next_u64()
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        UnwrapErr(OsRng).fill_bytes(bytes);
    }
}

impl CryptoRng for OsRandom {}

/// The operating system's generator, to hand to pure code that takes one.
pub fn os_rng() -> OsRandom {
    OsRandom
}

/// `N` random bytes from the operating system.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    OsRandom.fill_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    #[test]
    fn draws_differ() {
        assert_ne!(super::random_bytes::<16>(), super::random_bytes::<16>());
    }
}
