//! Free ports of loopback.

use std::io;
use std::net::TcpListener;
use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

use super::command::HOST;

/// Below the ports that systems give to outgoing connections (from 32,768 on), one of which could take a server's between this choice and
/// its start.
const RANGE: Range<u16> = 10_000..30_000;

/// Finds `count` ports that nothing listens on, without those that are `taken`.
///
/// The search begins at random: programs that choose at the same moment rarely choose the same ones.
///
/// # Errors
/// When there are not so many.
pub(crate) fn free(count: usize, taken: &[u16]) -> io::Result<Vec<u16>> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    // Truncated: the low digits are the ones that differ.
    let seed = pacs_types::mix(now as u64 ^ u64::from(std::process::id()).rotate_left(32));
    let length = RANGE.end - RANGE.start;
    let start = (seed % u64::from(length)) as u16;
    let candidates = (0..length).map(|place| RANGE.start + (start + place) % length);
    let is_free = |port: &u16| !taken.contains(port) && TcpListener::bind((HOST, *port)).is_ok();
    let ports: Vec<u16> = candidates.filter(is_free).take(count).collect();
    match ports.len() == count {
        true => Ok(ports),
        false => Err(io::Error::new(io::ErrorKind::AddrInUse, format!("{count} ports from {RANGE:?} are not free"))),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn ports_are_free_and_all_different() {
        let ports = free(5, &[]).expect("free ports");
        assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), 5);
        assert!(ports.iter().all(|port| RANGE.contains(port)));
        let _held: Vec<_> = ports.iter().map(|port| TcpListener::bind((HOST, *port)).expect("free")).collect();
        let (known, others) = (ports[0], free(5, &ports[1..]).expect("free ports"));
        assert!(!others.contains(&known) && others.iter().all(|port| !ports.contains(port)), "{others:?}");
        assert!(free(usize::from(RANGE.end), &[]).is_err());
    }
}
