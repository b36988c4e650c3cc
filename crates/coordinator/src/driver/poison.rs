//! What a panic under the lock comes to.

use std::sync::{Mutex, MutexGuard};

use pacs_runtime::Exit;

/// Enters a mutex whose content is worth something only as long as nobody has panicked in it.
///
/// A panic within a step of the machine leaves an event that is half applied and was never recorded: memory and journal
/// differ from then on, and what is acknowledged after that may be lost. So the process ends, and the next one resumes
/// from the journal, which knows nothing of that event. Nobody sees the state between: every call that waits for the lock gets
/// here, and the ticker does several times a second.
pub(super) fn enter<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|_| {
        let said =
            "the coordinator panicked in the middle of an event and ends; started again, it resumes from its journal";
        tracing::error!("{said}");
        // Where nobody has set up a log.
        eprintln!("error: {said}");
        std::process::exit(i32::from(Exit::Bug.code()))
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Set for the process that is to panic.
    const PANIC: &str = "PACS_TEST_PANIC";

    #[test]
    fn panics_when_it_is_told_to() {
        if std::env::var_os(PANIC).is_none() {
            return;
        }
        let mutex = Mutex::new(1);
        std::thread::scope(|scope| {
            let poisoned = scope.spawn(|| {
                let _guard = enter(&mutex);
                panic!("in the middle of an event");
            });
            assert!(poisoned.join().is_err());
        });
        *enter(&mutex) = 2;
        panic!("a poisoned mutex was entered");
    }

    #[test]
    fn a_poisoned_mutex_ends_the_process() {
        let tests = std::env::current_exe().unwrap();
        let arguments = ["--exact", "driver::poison::tests::panics_when_it_is_told_to", "--nocapture"];
        let output = Command::new(tests).args(arguments).env(PANIC, "1").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(70), "{said}");
        assert!(said.contains("resumes from its journal"), "{said}");
    }
}
