use std::io;

use pacs_types::Generation;

use super::group::GroupConfig;
use super::socket::Socket;
use super::wait::Limit;

/// First bytes of a greeting, which name protocol and version.
const MAGIC: [u8; 8] = *b"pacsrng1";
/// Longest text in a greeting or reply (bytes).
const TEXT_LIMIT: usize = 4096;

/// Greeting of a rank that dials its successor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) job: String,
    pub(crate) generation: Generation,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
}

/// Reply of the successor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Welcome,
    /// The dialling rank is in a later generation, and may ask again.
    NotYet(String),
    /// The dialling rank will never be admitted.
    Refused(String),
}

impl Hello {
    pub(crate) fn of(group: &GroupConfig) -> Self {
        let GroupConfig { job, generation, rank, addresses, timeout: _ } = group;
        Self { job: job.clone(), generation: *generation, rank: *rank, world_size: addresses.len() }
    }

    pub(crate) fn send(&self, socket: &Socket, limit: Limit<'_>) -> io::Result<()> {
        let mut bytes = MAGIC.to_vec();
        for number in [self.generation.0, self.rank as u64, self.world_size as u64] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(text_of(&self.job, TEXT_LIMIT));
        socket.write_all(&bytes, limit)
    }

    pub(crate) fn receive(socket: &Socket, limit: Limit<'_>) -> io::Result<Self> {
        let mut magic = [0; 8];
        socket.read_exact(&mut magic, limit)?;
        if magic != MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not the greeting of a rank"));
        }
        let number = || -> io::Result<u64> {
            let mut bytes = [0; 8];
            socket.read_exact(&mut bytes, limit)?;
            Ok(u64::from_le_bytes(bytes))
        };
        let generation = Generation(number()?);
        let rank = number()?;
        let world_size = number()?;
        let job = read_text(socket, TEXT_LIMIT, limit)?;
        let small = |value: u64| usize::try_from(value).map_err(io::Error::other);
        Ok(Self { job, generation, rank: small(rank)?, world_size: small(world_size)? })
    }

    /// Decides how the rank of `group` replies to this greeting.
    pub(crate) fn judge(&self, group: &GroupConfig) -> Answer {
        let ours = Self { rank: group.previous(), ..Self::of(group) };
        if self == &ours {
            return Answer::Welcome;
        }
        let reason = format!("rank {} expects {ours}, not {self}", group.rank);
        // This rank will catch up with a peer in a later generation; a peer in an earlier one has missed a regroup.
        if self.job == ours.job && self.generation > ours.generation {
            Answer::NotYet(reason)
        } else {
            Answer::Refused(reason)
        }
    }
}

impl std::fmt::Display for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { job, generation, rank, world_size } = self;
        write!(f, "rank {rank} of {world_size} of {generation} of job `{job}`")
    }
}

impl Answer {
    pub(crate) fn send(&self, socket: &Socket, limit: Limit<'_>) -> io::Result<()> {
        let (code, text) = match self {
            Self::Welcome => (0, ""),
            Self::NotYet(reason) => (1, reason.as_str()),
            Self::Refused(reason) => (2, reason.as_str()),
        };
        let mut bytes = vec![code];
        bytes.extend(text_of(text, TEXT_LIMIT));
        socket.write_all(&bytes, limit)
    }

    pub(crate) fn receive(socket: &Socket, limit: Limit<'_>) -> io::Result<Self> {
        let mut code = [0];
        socket.read_exact(&mut code, limit)?;
        let text = read_text(socket, TEXT_LIMIT, limit)?;
        match code[0] {
            0 => Ok(Self::Welcome),
            1 => Ok(Self::NotYet(text)),
            2 => Ok(Self::Refused(text)),
            other => Err(io::Error::new(io::ErrorKind::InvalidData, format!("answer code {other}"))),
        }
    }
}

/// Encodes a text as its length and its bytes, cut at `most` bytes.
pub(super) fn text_of(text: &str, most: usize) -> Vec<u8> {
    let text = &text.as_bytes()[..text.len().min(most)];
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes
}

/// Reads a text of at most `most` bytes.
pub(super) fn read_text(socket: &Socket, most: usize, limit: Limit<'_>) -> io::Result<String> {
    let mut length = [0; 8];
    socket.read_exact(&mut length, limit)?;
    let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > most {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a text of {length} bytes")));
    }
    let mut text = vec![0; length];
    socket.read_exact(&mut text, limit)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}
