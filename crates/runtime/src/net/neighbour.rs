//! Checks which user owns the process at the other end of a connection within this machine.
//!
//! Plain text proves nothing, and every user of a machine can listen on a loopback port. When a coordinator is
//! killed, another user could take its port, and its workers would carry out that user's orders. The kernel
//! knows the owners of sockets.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;

/// State of a listening socket in `/proc/net/tcp`.
const LISTENS: &str = "0A";

/// Refuses the process at `theirs`, to which this one has connected from `ours`, if it belongs to another user, except
/// for the superuser.
///
/// # Errors
/// When it does. If the system does not tell the owner, the connection is allowed.
pub(super) fn check(ours: SocketAddr, theirs: SocketAddr) -> io::Result<()> {
    let Some(user) = own_user() else { return Ok(()) };
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| fs::read_to_string(path).unwrap_or_default());
    let sockets = || tables.iter().flat_map(|table| table.lines()).filter_map(Socket::parse);
    match owner(sockets, ours, theirs) {
        Some(owner) if owner != user && owner != 0 => Err(io::Error::other(format!(
            "a process of user {owner} listens at {theirs}, and this one is of user {user}: without certificates (--tls-dir) \
             only processes of one user work together"
        ))),
        _ => Ok(()),
    }
}

/// User id of this process.
fn own_user() -> Option<u32> {
    fs::metadata("/proc/self").ok().map(|metadata| metadata.uid())
}

/// A line of `/proc/net/tcp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Socket {
    local: SocketAddr,
    remote: SocketAddr,
    listens: bool,
    user: u32,
    /// 0 while no process has accepted the connection.
    inode: u64,
}

impl Socket {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, remote) = (address(fields.next()?)?, address(fields.next()?)?);
        let listens = fields.next()? == LISTENS;
        // Skips queues, timer and retransmissions.
        let user = fields.nth(3)?.parse().ok()?;
        let inode = fields.nth(1)?.parse().ok()?;
        Some(Self { local, remote, listens, user, inode })
    }
}

/// Parses an address as the kernel prints it: 32-bit words in the machine's byte order.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |index: usize| ip.get(8 * index..8 * index + 8).and_then(|word| u32::from_str_radix(word, 16).ok());
    let ip = match ip.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?.to_ne_bytes())),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?].map(u32::to_ne_bytes);
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            // A dual-stack socket has IPv4 addresses mapped into IPv6.
            IpAddr::from(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// User of the socket at `theirs` that is connected to `ours`; before the connection is accepted,
/// that of the listening socket.
fn owner<I: Iterator<Item = Socket>>(sockets: impl Fn() -> I, ours: SocketAddr, theirs: SocketAddr) -> Option<u32> {
    let accepted = sockets().find(|socket| (socket.local, socket.remote) == (theirs, ours) && socket.inode != 0);
    let is_there = |socket: &Socket| socket.local.port() == theirs.port() && socket.listens;
    let listens = |exact: bool| {
        sockets().find(|socket| {
            let ip = socket.local.ip();
            is_there(socket) && if exact { ip == theirs.ip() } else { ip.is_unspecified() }
        })
    };
    // The kernel prefers a listener on this exact address.
    accepted.or_else(|| listens(true)).or_else(|| listens(false)).map(|socket| socket.user)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1E14 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 637 1 0 100 0 0 10 0
   1: 00000000:1E14 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1001        0 638 1 0 100 0 0 10 0
   2: 00000000:1E15 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1002        0 639 1 0 100 0 0 10 0
   3: 0100007F:1E14 0100007F:A000 01 00000000:00000000 00:00000000 00000000  1003        0 640 1 0 20 4 30 10 -1
   4: 0100007F:1E14 0100007F:A001 01 00000000:00000000 00:00000000 00000000     0        0 0 1 0 20 4 30 10 -1
   5: 0000000000000000FFFF00000100007F:1E16 0000000000000000FFFF00000100007F:A000 01 00000000:00000000 00:00000000 00000000  1004        0 641 1 0";

    #[test]
    #[cfg(target_endian = "little")]
    fn the_owner_is_that_of_the_connection_or_of_who_listens() {
        let sockets = || TABLE.lines().filter_map(Socket::parse);
        let address = |text: &str| text.parse().expect("an address");
        let owner = |ours: &str, theirs: &str| owner(sockets, address(ours), address(theirs));
        assert_eq!(owner("127.0.0.1:40960", "127.0.0.1:7700"), Some(1003), "accepted");
        assert_eq!(owner("127.0.0.1:40961", "127.0.0.1:7700"), Some(1000), "not accepted yet");
        assert_eq!(owner("127.0.0.1:40961", "127.0.0.2:7700"), Some(1001), "listens at any address");
        assert_eq!(owner("127.0.0.1:40961", "127.0.0.1:7701"), Some(1002), "listens at any address");
        assert_eq!(owner("127.0.0.1:40960", "127.0.0.1:7702"), Some(1004), "of both families");
        assert_eq!(owner("127.0.0.1:40960", "127.0.0.1:7703"), None);
        assert_eq!(sockets().count(), 6);
    }

    #[test]
    fn a_process_of_this_user_passes() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let stream = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        let (ours, theirs) = (stream.local_addr().expect("ours"), stream.peer_addr().expect("theirs"));
        check(ours, theirs).expect("not accepted yet");
        let _accepted = listener.accept().expect("accepted");
        check(ours, theirs).expect("accepted");
    }
}
