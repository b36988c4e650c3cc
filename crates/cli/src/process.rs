//! Facts about processes from `/proc`.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Returns the host name of this machine.
pub(crate) fn host() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default()
}

/// Returns when the process started, in clock ticks since boot; `None` when it does not exist or is a zombie. Process ids are
/// reused, so a process is identified by its id together with this.
pub(crate) fn began(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program name before it may contain spaces and parentheses, so split at the last one.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    // proc_pid_stat(5) counts the state as field 3 and the start as field 22.
    let began = fields.nth(18)?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(began)
}

/// Returns the ids of all processes visible to this one.
pub(crate) fn all() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Returns whether the process belongs to the same user as this one.
pub(crate) fn is_own(pid: u32) -> bool {
    let owner = |pid: &str| fs::metadata(format!("/proc/{pid}")).ok().map(|metadata| metadata.uid());
    owner(&pid.to_string()).is_some_and(|uid| Some(uid) == owner("self"))
}

/// Returns the executable of the process, without the suffix ` (deleted)` that Linux adds after a rebuild.
pub(crate) fn program(pid: u32) -> Option<PathBuf> {
    let path = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let bytes = path.into_os_string().into_vec();
    let bytes = bytes.strip_suffix(b" (deleted)").unwrap_or(&bytes);
    Some(OsString::from_vec(bytes.to_vec()).into())
}

/// Returns whether the process was started with this environment variable.
pub(crate) fn has_variable(pid: u32, name: &str, value: &str) -> bool {
    let wanted = format!("{name}={value}");
    words(pid, "environ").iter().any(|word| word == wanted.as_bytes())
}

/// Returns whether the process was started with the option followed by this value.
pub(crate) fn has_option(pid: u32, option: &str, value: &str) -> bool {
    words(pid, "cmdline").windows(2).any(|pair| pair[0] == option.as_bytes() && pair[1] == value.as_bytes())
}

/// Returns whether this word is in the command line of the process.
pub(crate) fn has_word(pid: u32, wanted: &str) -> bool {
    words(pid, "cmdline").iter().any(|word| word == wanted.as_bytes())
}

/// Reads a file of NUL-separated words, such as `cmdline`; empty when it cannot be read.
fn words(pid: u32, file: &str) -> Vec<Vec<u8>> {
    let bytes = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
    bytes.split(|byte| *byte == 0).map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_known_while_it_lives() {
        let this = std::process::id();
        assert!(began(this).is_some_and(|ticks| ticks > 0) && began(this) == began(this));
        assert!(all().contains(&this) && is_own(this) && !has_variable(this, "PACS_NO_SUCH", "x"));
        assert_eq!(program(this), std::env::current_exe().ok());
        let mut child = Command::new("sleep").arg("60").spawn().expect("sleep");
        assert!(began(child.id()).is_some());
        child.kill().expect("killed");
        // A zombie: it still has a process id until it is waited for.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while began(child.id()).is_some() {
            assert!(std::time::Instant::now() < deadline, "a dead process counts as alive");
        }
        child.wait().expect("it ended");
        assert_eq!((began(child.id()), began(u32::MAX)), (None, None));
    }
}
