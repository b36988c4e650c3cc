//! Identity and digests of a weight version, by which a receiver verifies it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pacs_protocol::{WireError, v1};
use pacs_types::{Generation, WeightVersion};

use crate::Probe;

/// Bounds on the size of a piece, in bytes. Small pieces let a chain of hosts start early, large
/// ones cost fewer round trips.
const PIECE_BYTES: Range<u64> = 1 << 20..(64 << 20) + 1;
/// Number of pieces of a version, where the bounds allow it.
const PIECES: u64 = 512;
/// Largest version that an announcement may describe: 16 TiB in 256 Ki pieces, with 8 MiB of digests.
const MOST_BYTES: u64 = 1 << 44;
const MOST_PIECES: u64 = 1 << 18;
/// Bound on the threads that digest a version.
const MOST_THREADS: usize = 8;

/// A BLAKE3 digest.
pub type Digest = [u8; 32];

/// Identity of a weight version. Later ones compare greater, even after a lost generation has set the job back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VersionId {
    /// Generation of learners that published it.
    pub generation: Generation,
    /// Training steps that it has seen.
    pub version: WeightVersion,
}

impl VersionId {
    /// Version `version` of generation `generation`.
    #[must_use]
    pub fn new(generation: u64, version: u64) -> Self {
        Self { generation: Generation(generation), version: WeightVersion(version) }
    }
}

impl fmt::Display for VersionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "version {} of generation {}", self.version.0, self.generation.0)
    }
}

/// Element type of the published weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightKind {
    /// IEEE single precision.
    Float32,
    /// The upper 16 bits of single precision.
    Bfloat16,
}

impl WeightKind {
    fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Bfloat16 => "bfloat16",
        }
    }

    fn element_bytes(self) -> u64 {
        match self {
            Self::Float32 => 4,
            Self::Bfloat16 => 2,
        }
    }
}

/// What the content of a version adapts, where it is adapters and no whole model. The digest of the version covers it, so adapters
/// never reach an engine that has another base or would apply them in another way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adapted {
    /// Digest of the base ([`Description::digest`] of its weights, in the kind of the version).
    pub base: Digest,
    /// How the adapters are applied: rank, scale and targets, as text. At most 1024 bytes.
    pub settings: String,
}

impl Adapted {
    /// Adapters of a base with these weights, raw bytes of `kind` in the layout of its parameters.
    ///
    /// # Panics
    /// When `base` is empty.
    #[must_use]
    pub fn of(kind: WeightKind, base: &[u8], settings: String) -> Self {
        Self { base: *Description::of(VersionId::new(0, 0), kind, base).digest(), settings }
    }

    /// The digest of the base in hexadecimal digits.
    #[must_use]
    pub fn base_digits(&self) -> String {
        self.base.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Digests the weights of a base in the order in which they are read, as [`Adapted::of`] does with all of them in memory.
#[derive(Debug)]
pub struct BaseDigest {
    kind: WeightKind,
    bytes: u64,
    piece_bytes: u64,
    pieces: Vec<Digest>,
    /// Of the piece that is not whole yet.
    hasher: blake3::Hasher,
    seen: u64,
}

impl BaseDigest {
    /// For weights of `bytes` bytes in all.
    #[must_use]
    pub fn new(kind: WeightKind, bytes: u64) -> Self {
        let (piece_bytes, hasher) = (piece_bytes(bytes), blake3::Hasher::new());
        Self { kind, bytes, piece_bytes, pieces: Vec::new(), hasher, seen: 0 }
    }

    /// Takes the next bytes, any number of them.
    pub fn update(&mut self, mut content: &[u8]) {
        while !content.is_empty() {
            let left = self.piece_bytes - self.seen % self.piece_bytes;
            let now = content.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let (part, rest) = content.split_at(now);
            self.hasher.update(part);
            self.seen += part.len() as u64;
            if self.seen.is_multiple_of(self.piece_bytes) {
                self.close_piece();
            }
            content = rest;
        }
    }

    /// The digest of the base.
    ///
    /// # Panics
    /// When not exactly as many bytes were taken as were announced.
    #[must_use]
    pub fn finish(mut self) -> Digest {
        assert_eq!(self.seen, self.bytes, "the base is digested in full");
        if !self.seen.is_multiple_of(self.piece_bytes) {
            self.close_piece();
        }
        overall(self.kind, self.bytes, self.piece_bytes, &self.pieces, None)
    }

    fn close_piece(&mut self) {
        let whole = std::mem::replace(&mut self.hasher, blake3::Hasher::new());
        self.pieces.push(*whole.finalize().as_bytes());
    }
}

/// Longest text of [`Adapted::settings`] that is taken from the wire (bytes).
const MOST_SETTINGS: usize = 1024;

/// A weight version and its digests: raw bytes in the layout of the model's parameters,
/// divided into pieces of one size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    id: VersionId,
    kind: WeightKind,
    bytes: u64,
    piece_bytes: u64,
    pieces: Arc<[Digest]>,
    adapted: Option<Arc<Adapted>>,
    digest: Digest,
}

impl Description {
    /// Computes the description of `content`.
    ///
    /// # Panics
    /// When `content` is empty.
    #[must_use]
    pub fn of(id: VersionId, kind: WeightKind, content: &[u8]) -> Self {
        let piece_bytes = piece_bytes(content.len() as u64);
        Self::digested(id, kind, None, content, piece_bytes, |_, piece| Ok::<_, std::convert::Infallible>(hash(piece)))
            .unwrap_or_else(|never| match never {})
    }

    /// Digests every piece of `content` by `digest`, on several threads, which may also process
    /// the piece while it is cached.
    pub(crate) fn digested<E: Send>(
        id: VersionId,
        kind: WeightKind,
        adapted: Option<Adapted>,
        content: &[u8],
        piece_bytes: u64,
        digest: impl Fn(u64, &[u8]) -> Result<Digest, E> + Sync,
    ) -> Result<Self, E> {
        assert!(!content.is_empty(), "a model has parameters");
        let parts: Vec<&[u8]> = content.chunks(usize::try_from(piece_bytes).expect("a piece fits in memory")).collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS).min(parts.len());
        let next = AtomicUsize::new(0);
        let work = || -> Result<Vec<(usize, Digest)>, E> {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(part) = parts.get(index) else { return Ok(done) };
                done.push((index, digest(index as u64 * piece_bytes, part)?));
            }
        };
        let mut done = std::thread::scope(|scope| {
            let helpers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut done = work()?;
            for helper in helpers {
                match helper.join() {
                    Ok(more) => done.extend(more?),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok(done)
        })?;
        done.sort_unstable_by_key(|(index, _)| *index);
        let pieces: Arc<[Digest]> = done.into_iter().map(|(_, digest)| digest).collect();
        let bytes = content.len() as u64;
        let digest = overall(kind, bytes, piece_bytes, &pieces, adapted.as_ref());
        Ok(Self { id, kind, bytes, piece_bytes, pieces, adapted: adapted.map(Arc::new), digest })
    }

    /// Identity of the version.
    #[must_use]
    pub fn id(&self) -> VersionId {
        self.id
    }

    /// Element type of the weights.
    #[must_use]
    pub fn kind(&self) -> WeightKind {
        self.kind
    }

    /// Total size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Number of pieces, at least one.
    #[must_use]
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// What the version adapts; `None` for a whole model.
    #[must_use]
    pub fn adapted(&self) -> Option<&Adapted> {
        self.adapted.as_deref()
    }

    /// Digest over element type, sizes, what adapters belong to, and the digests of all pieces.
    #[must_use]
    pub fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Byte range of a piece in the file.
    ///
    /// # Panics
    /// When `index` is out of range.
    #[must_use]
    pub fn piece(&self, index: usize) -> Range<u64> {
        assert!(index < self.pieces.len(), "piece {index} of {}", self.pieces.len());
        let begin = index as u64 * self.piece_bytes;
        begin..(begin + self.piece_bytes).min(self.bytes)
    }

    /// Whether `found` is the digest of this piece.
    #[must_use]
    pub fn is_piece(&self, index: usize, found: &Digest) -> bool {
        self.pieces.get(index) == Some(found)
    }

    /// Name of the version's file in a store, different for different contents.
    #[must_use]
    pub fn file_name(&self) -> String {
        let prefix: String = self.digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{}-{}-{prefix}", self.id.generation.0, self.id.version.0)
    }
}

/// The version in a store's file of this name; `None` for other files.
pub(crate) fn id_of_file(name: &str) -> Option<VersionId> {
    let mut parts = name.splitn(3, '-');
    let mut number = || parts.next()?.parse().ok();
    let (generation, version) = (number()?, number()?);
    parts.next()?;
    Some(VersionId::new(generation, version))
}

/// Size of the pieces of a version with this many bytes.
pub(crate) fn piece_bytes(bytes: u64) -> u64 {
    (bytes / PIECES).next_power_of_two().clamp(PIECE_BYTES.start, PIECE_BYTES.end - 1)
}

pub(crate) fn hash(bytes: &[u8]) -> Digest {
    *blake3::hash(bytes).as_bytes()
}

fn overall(kind: WeightKind, bytes: u64, piece_bytes: u64, pieces: &[Digest], adapted: Option<&Adapted>) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"pacs weights 1 ").update(kind.name().as_bytes());
    hasher.update(&bytes.to_le_bytes()).update(&piece_bytes.to_le_bytes());
    for piece in pieces {
        hasher.update(piece);
    }
    if let Some(Adapted { base, settings }) = adapted {
        hasher.update(b" adapters of ").update(base).update(settings.as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// A weight version, the address of its first sender, and what shows that a server computes with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Announcement {
    /// The announced version.
    pub description: Description,
    /// Data address of the learner that published it (host:port); empty if that serves none.
    pub address: String,
    /// The learner's scores of one sequence; `None` where no rollout engine is checked by them.
    pub probe: Option<Arc<Probe>>,
}

impl From<&Announcement> for v1::WeightsRef {
    fn from(announcement: &Announcement) -> Self {
        let Description { id, kind, bytes, piece_bytes, pieces, adapted, digest } = &announcement.description;
        Self {
            version: id.version.0,
            generation: id.generation.0,
            address: announcement.address.clone(),
            bytes: *bytes,
            kind: kind.name().to_owned(),
            piece_bytes: *piece_bytes,
            piece_digests: pieces.concat().into(),
            digest: digest.to_vec().into(),
            base_digest: adapted.as_ref().map(|adapted| adapted.base.to_vec().into()).unwrap_or_default(),
            adapters: adapted.as_ref().map(|adapted| adapted.settings.clone()).unwrap_or_default(),
            probe: announcement.probe.as_deref().map(v1::Probe::from),
        }
    }
}

impl TryFrom<&v1::WeightsRef> for Announcement {
    type Error = WireError;

    fn try_from(wire: &v1::WeightsRef) -> Result<Self, WireError> {
        let wrong = |field: &'static str, problem: String| Err(WireError { field, problem });
        let kind = match wire.kind.as_str() {
            "float32" => WeightKind::Float32,
            "bfloat16" => WeightKind::Bfloat16,
            other => return wrong("weights.kind", format!("is `{}`", other.escape_debug())),
        };
        let (bytes, piece_bytes) = (wire.bytes, wire.piece_bytes);
        if bytes == 0 || bytes > MOST_BYTES || !bytes.is_multiple_of(kind.element_bytes()) {
            return wrong("weights.bytes", format!("is {bytes}"));
        }
        // No lower bound: memory is not allocated by piece, so small pieces only cost round trips.
        if piece_bytes == 0 || piece_bytes >= PIECE_BYTES.end || bytes.div_ceil(piece_bytes) > MOST_PIECES {
            return wrong("weights.piece_bytes", format!("is {piece_bytes} for {bytes} bytes"));
        }
        let (digests, rest) = wire.piece_digests.as_chunks::<32>();
        if !rest.is_empty() || digests.len() as u64 != bytes.div_ceil(piece_bytes) {
            let problem = format!("has {} bytes for {} pieces", wire.piece_digests.len(), bytes.div_ceil(piece_bytes));
            return wrong("weights.piece_digests", problem);
        }
        let pieces: Arc<[Digest]> = digests.into();
        let adapted = match (<Digest>::try_from(&wire.base_digest[..]), wire.base_digest.is_empty()) {
            (Ok(base), _) => Some(Adapted { base, settings: wire.adapters.clone() }),
            (Err(_), true) => None,
            (Err(_), false) => {
                return wrong("weights.base_digest", format!("has {} bytes, not 32", wire.base_digest.len()));
            }
        };
        if wire.adapters.len() > MOST_SETTINGS || wire.adapters.is_empty() == adapted.is_some() {
            return wrong("weights.adapters", format!("has {} bytes", wire.adapters.len()));
        }
        let digest = overall(kind, bytes, piece_bytes, &pieces, adapted.as_ref());
        if wire.digest[..] != digest {
            return wrong("weights.digest", "does not belong to the digests of the pieces".into());
        }
        if !wire.address.is_empty() && !is_address(&wire.address) {
            return wrong("weights.address", "is not host:port".into());
        }
        let id = VersionId::new(wire.generation, wire.version);
        let probe = wire.probe.as_ref().map(Probe::try_from).transpose()?;
        if let Some(previous) = probe.as_ref().map(Probe::previous).filter(|previous| *previous >= id.version) {
            let problem = format!("is {}, and the version is {}", previous.0, id.version.0);
            return wrong("weights.probe.previous_version", problem);
        }
        let adapted = adapted.map(Arc::new);
        let description = Description { id, kind, bytes, piece_bytes, pieces, adapted, digest };
        Ok(Self { description, address: wire.address.clone(), probe: probe.map(Arc::new) })
    }
}

/// Whether a text has the form of a dialable address (host:port); names are not resolved.
#[must_use]
pub fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:%".contains(&byte);
    !bare.is_empty() && text.len() <= 300 && bare.bytes().all(plain) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announcement() -> Announcement {
        let content: Vec<u8> = (0..10_000u32).flat_map(u32::to_le_bytes).collect();
        let digested =
            Description::digested(VersionId::new(2, 7), WeightKind::Float32, None, &content, 4096, |_, piece| {
                Ok::<_, std::convert::Infallible>(hash(piece))
            });
        Announcement {
            description: digested.unwrap_or_else(|never| match never {}),
            address: "10.0.0.7:4711".into(),
            probe: None,
        }
    }

    #[test]
    fn pieces_cover_the_bytes_and_are_told_apart() {
        let description = announcement().description;
        assert_eq!((description.bytes(), description.pieces()), (40_000, 10));
        let covered: u64 = (0..10).map(|index| description.piece(index)).map(|piece| piece.end - piece.start).sum();
        assert_eq!((covered, description.piece(9)), (40_000, 36_864..40_000));
        let content: Vec<u8> = (0..10_000u32).flat_map(u32::to_le_bytes).collect();
        assert!(description.is_piece(3, &hash(&content[3 * 4096..4 * 4096])));
        assert!(!description.is_piece(4, &hash(&content[3 * 4096..4 * 4096])));
    }

    #[test]
    fn a_file_is_named_after_version_and_content() {
        let name = announcement().description.file_name();
        assert_eq!(id_of_file(&name), Some(VersionId::new(2, 7)));
        assert_eq!(id_of_file("lock"), None);
        assert!(name.starts_with("2-7-") && name.len() == 4 + 16, "{name}");
    }

    #[test]
    fn large_models_have_large_pieces() {
        assert_eq!(piece_bytes(1000), 1 << 20);
        assert_eq!(piece_bytes(1 << 30), 2 << 20);
        assert_eq!(piece_bytes(15 << 30), 32 << 20);
        assert_eq!(piece_bytes(140 << 30), 64 << 20);
    }

    #[test]
    fn an_announcement_survives_the_wire() {
        let wire = v1::WeightsRef::from(&announcement());
        assert_eq!(Announcement::try_from(&wire), Ok(announcement()));
    }

    #[test]
    fn a_base_has_one_digest_however_it_is_read() {
        for bytes in [4, 1 << 20, (5 << 20) / 2, 3 << 20] {
            let content: Vec<u8> = (0..bytes).map(|place: u32| (place % 251) as u8).collect();
            let whole = Adapted::of(WeightKind::Float32, &content, String::new()).base;
            for step in [7, 1 << 16, (1 << 20) + 1, 1 << 30] {
                let mut digest = BaseDigest::new(WeightKind::Float32, content.len() as u64);
                content.chunks(step).for_each(|part| digest.update(part));
                assert_eq!(digest.finish(), whole, "{bytes} bytes, {step} at a time");
            }
        }
    }

    #[test]
    fn adapters_of_another_base_are_another_version() {
        let of = |base: Option<(u8, &str)>| {
            let adapted = base.map(|(base, settings)| Adapted { base: [base; 32], settings: settings.to_owned() });
            let described =
                Description::digested(VersionId::new(2, 7), WeightKind::Float32, adapted, b"abcd", 4096, |_, piece| {
                    Ok::<_, std::convert::Infallible>(hash(piece))
                });
            Announcement {
                description: described.unwrap_or_else(|never| match never {}),
                address: String::new(),
                probe: None,
            }
        };
        let versions = [None, Some((1, "rank 8")), Some((2, "rank 8")), Some((1, "rank 4"))].map(of);
        for (place, version) in versions.iter().enumerate() {
            assert!(versions[..place].iter().all(|other| other.description.digest() != version.description.digest()));
            assert_eq!(Announcement::try_from(&v1::WeightsRef::from(version)).as_ref(), Ok(version));
        }
        let refused = |change: fn(&mut v1::WeightsRef)| {
            let mut wire = v1::WeightsRef::from(&of(Some((1, "rank 8"))));
            change(&mut wire);
            Announcement::try_from(&wire).expect_err("must be refused").field
        };
        assert_eq!(refused(|wire| wire.base_digest = vec![1; 31].into()), "weights.base_digest");
        assert_eq!(refused(|wire| wire.base_digest = vec![2; 32].into()), "weights.digest");
        assert_eq!(refused(|wire| wire.base_digest.clear()), "weights.adapters");
        assert_eq!(refused(|wire| wire.adapters.clear()), "weights.adapters");
        assert_eq!(refused(|wire| wire.adapters = "rank 4".into()), "weights.digest");
        assert_eq!(refused(|wire| wire.adapters = "x".repeat(1025)), "weights.adapters");
    }

    #[test]
    fn senseless_announcements_are_refused_by_field() {
        let refused = |change: fn(&mut v1::WeightsRef)| {
            let mut wire = v1::WeightsRef::from(&announcement());
            change(&mut wire);
            Announcement::try_from(&wire).expect_err("must be refused").field
        };
        assert_eq!(refused(|wire| wire.kind = "int8".into()), "weights.kind");
        assert_eq!(refused(|wire| wire.bytes = 0), "weights.bytes");
        assert_eq!(refused(|wire| wire.bytes = u64::MAX - 3), "weights.bytes");
        assert_eq!(refused(|wire| wire.bytes = 39_999), "weights.bytes");
        assert_eq!(refused(|wire| wire.piece_bytes = 0), "weights.piece_bytes");
        assert_eq!(refused(|wire| wire.piece_bytes = 1 << 40), "weights.piece_bytes");
        assert_eq!(refused(|wire| (wire.bytes, wire.piece_bytes) = (1 << 40, 1)), "weights.piece_bytes");
        assert_eq!(refused(|wire| wire.piece_digests = vec![0; 319].into()), "weights.piece_digests");
        assert_eq!(refused(|wire| wire.piece_digests = vec![0; 320].into()), "weights.digest");
        assert_eq!(refused(|wire| wire.kind = "bfloat16".into()), "weights.digest");
        assert_eq!(refused(|wire| wire.address = "10.0.0.7".into()), "weights.address");
        assert_eq!(refused(|wire| wire.address = "10.0.0.7:0".into()), "weights.address");
        assert_eq!(refused(|wire| wire.address = "a b:1".into()), "weights.address");
    }
}
