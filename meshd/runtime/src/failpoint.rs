/// A place in the code at which a test may make a daemon stop or misbehave on purpose, by its name in
/// `MESH_FAILPOINT` (several are separated by commas).
///
/// Only a build with the cargo feature `failpoints` looks there; any other build compiles every point
/// to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failpoint(&'static str);

impl Failpoint {
    /// The place that `MESH_FAILPOINT` calls `name`.
    pub const fn new(name: &'static str) -> Self {
        Self(name)
    }

    /// Ends the process as a crash would, when the environment names this point.
    pub fn crash(self) {
        if self.is_set() {
            std::process::abort();
        }
    }

    /// Whether the environment names this point; never, in a build without failpoints.
    pub fn is_set(self) -> bool {
        cfg!(feature = "failpoints")
            && std::env::var("MESH_FAILPOINT")
                .is_ok_and(|set| set.split(',').any(|point| point.trim() == self.0))
    }
}
