use pacs_types::{GroupId, LeaseId, SampleId};

use super::stored::StoredFrame;

/// Size of a header: length and checksum, then kind, group, index and lease, all little-endian.
pub(super) const HEADER_BYTES: usize = 4 + 4 + 1 + 8 + 4 + 8;
/// Upper bound on a frame; a longer length in a header is damage.
pub(super) const MOST_BYTES: usize = 1 << 30;

/// Identity of a frame's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum FrameKey {
    /// A sample, and the lease that it was submitted under.
    Sample(SampleId, LeaseId),
    /// A verdict, and the lease that it was submitted under.
    Verdict(SampleId, LeaseId),
}

impl FrameKey {
    /// Kind of the content, for log lines.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Sample(..) => "sample",
            Self::Verdict(..) => "verdict",
        }
    }

    pub(super) fn sample(self) -> SampleId {
        match self {
            Self::Sample(sample, _) | Self::Verdict(sample, _) => sample,
        }
    }

    fn parts(self) -> (u8, SampleId, LeaseId) {
        match self {
            Self::Sample(sample, lease) => (1, sample, lease),
            Self::Verdict(sample, lease) => (2, sample, lease),
        }
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first()?;
        let (group, rest) = rest.split_first_chunk::<8>()?;
        let (index, rest) = rest.split_first_chunk::<4>()?;
        let (lease, _) = rest.split_first_chunk::<8>()?;
        let sample = SampleId { group: GroupId(u64::from_le_bytes(*group)), index: u32::from_le_bytes(*index) };
        let lease = LeaseId(u64::from_le_bytes(*lease));
        match kind {
            1 => Some(Self::Sample(sample, lease)),
            2 => Some(Self::Verdict(sample, lease)),
            _ => None,
        }
    }
}

/// A sample or verdict to be written.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) key: FrameKey,
    pub(crate) body: Vec<u8>,
    stored: StoredFrame,
}

impl Frame {
    pub(crate) fn new(key: FrameKey, body: Vec<u8>) -> Self {
        Self { key, body, stored: StoredFrame::default() }
    }

    /// A handle that reads the frame back once it is durable.
    pub(crate) fn stored(&self) -> StoredFrame {
        self.stored.clone()
    }

    /// The header, including the checksum over the body.
    pub(super) fn header(&self) -> [u8; HEADER_BYTES] {
        let (kind, sample, lease) = self.key.parts();
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&u32::try_from(self.body.len()).unwrap_or(u32::MAX).to_le_bytes());
        header[8] = kind;
        header[9..17].copy_from_slice(&sample.group.0.to_le_bytes());
        header[17..21].copy_from_slice(&sample.index.to_le_bytes());
        header[21..].copy_from_slice(&lease.0.to_le_bytes());
        let checksum = checksum(&header[8..], &self.body);
        header[4..8].copy_from_slice(&checksum.to_le_bytes());
        header
    }
}

/// Parses a header: the key, the length of the body, and the checksum of both.
pub(super) fn read_header(header: &[u8; HEADER_BYTES]) -> Option<(FrameKey, usize, u32)> {
    let (length, rest) = header.split_first_chunk::<4>()?;
    let (checksum, rest) = rest.split_first_chunk::<4>()?;
    let length = u32::from_le_bytes(*length) as usize;
    let key = FrameKey::read(rest)?;
    (length <= MOST_BYTES).then_some((key, length, u32::from_le_bytes(*checksum)))
}

pub(super) fn checksum(key: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key);
    hasher.update(body);
    hasher.finalize()
}
