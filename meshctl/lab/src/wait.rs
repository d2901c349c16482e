use std::{
    thread,
    time::{Duration, Instant},
};

use crate::LabError;

const POLL_FIRST: Duration = Duration::from_millis(2);
const POLL_MAX: Duration = Duration::from_millis(50);

/// Polls `condition` until it holds. `what` names it in the error.
///
/// # Errors
/// [`LabError::Deadline`] if it does not hold within `deadline`; it is asked at least once.
pub fn wait_until(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> bool,
) -> Result<(), LabError> {
    wait_for(what, deadline, || condition().then_some(()))
}

/// Polls `attempt` until it yields a value. `what` names it in the error.
///
/// # Errors
/// [`LabError::Deadline`] if none comes within `deadline`; it is asked at least once.
pub fn wait_for<T>(
    what: &str,
    deadline: Duration,
    mut attempt: impl FnMut() -> Option<T>,
) -> Result<T, LabError> {
    let started = Instant::now();
    let mut pause = POLL_FIRST;
    loop {
        if let Some(value) = attempt() {
            return Ok(value);
        }
        let Some(left) = deadline.checked_sub(started.elapsed()) else {
            return Err(LabError::Deadline { what: what.to_owned(), deadline });
        };
        thread::sleep(pause.min(left));
        pause = (pause * 2).min(POLL_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_with_the_condition_or_the_deadline() {
        let mut calls = 0;
        wait_until("three calls", Duration::from_secs(30), || {
            calls += 1;
            calls == 3
        })
        .unwrap();
        let refused = wait_until("never", Duration::from_millis(20), || false);
        assert!(matches!(refused, Err(LabError::Deadline { what, .. }) if what == "never"));
    }
}
