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

/// Returns the value of an environment variable that the process was started with.
pub(crate) fn variable(pid: u32, name: &str) -> Option<String> {
    let start = format!("{name}=");
    let words = words(pid, "environ");
    let value = words.iter().find_map(|word| word.strip_prefix(start.as_bytes()))?;
    String::from_utf8(value.to_vec()).ok()
}

/// Returns whether the process leads its process group.
pub(crate) fn leads_its_group(pid: u32) -> bool {
    let Ok(id) = i32::try_from(pid) else { return false };
    nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(id))).is_ok_and(|group| group.as_raw() == id)
}

/// Returns whether the command line of the process ends with these words.
pub(crate) fn ends_with_words(pid: u32, wanted: &[String]) -> bool {
    let mut words = words(pid, "cmdline");
    // The last word is followed by a NUL, too.
    words.pop_if(|word| word.is_empty());
    words.len() >= wanted.len()
        && words[words.len() - wanted.len()..].iter().eq(wanted.iter().map(|word| word.as_bytes()))
}

/// Returns the values of a repeated option of the process.
pub(crate) fn values_of(pid: u32, option: &str) -> Vec<String> {
    let words = words(pid, "cmdline");
    let pairs = words.windows(2).filter(|pair| pair[0] == option.as_bytes());
    pairs.map(|pair| String::from_utf8_lossy(&pair[1]).into_owned()).collect()
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
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        // It shows its arguments a moment after its start.
        while !has_option(child.id(), "sleep", "60") || variable(child.id(), "PATH").is_none() {
            assert!(std::time::Instant::now() < deadline, "a process without a command line");
        }
        assert!(ends_with_words(child.id(), &["60".to_owned()]) && !ends_with_words(child.id(), &["6".to_owned()]));
        assert_eq!(values_of(child.id(), "sleep"), ["60"]);
        assert!(!leads_its_group(child.id()) && variable(child.id(), "PACS_NO_SUCH").is_none());
        assert_eq!(variable(child.id(), "PATH"), std::env::var("PATH").ok());
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
