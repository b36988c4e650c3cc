//! The append-only files with samples and verdicts.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pacs_types::GroupId;

use super::frame::{Frame, FrameKey, HEADER_BYTES, checksum, read_header};
use super::stored::{Segment, StoredFrame};
use crate::FileError;
use crate::records::is_full;

/// Size at which a segment is closed.
const SEGMENT_BYTES: u64 = 64 << 20;
/// Size up to which small frames are written together.
const BUFFER_BYTES: usize = 1 << 20;

fn segment_path(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("samples-{number:06}.seg"))
}

/// Numbers of the segments in a folder, ascending.
fn numbers(folder: &Path) -> Result<Vec<u64>, FileError> {
    let entries = fs::read_dir(folder).map_err(FileError::file("list folder", folder))?;
    let mut numbers = Vec::new();
    for entry in entries {
        let name = entry.map_err(FileError::file("list folder", folder))?.file_name();
        let number: Option<u64> =
            name.to_str().and_then(|name| name.strip_prefix("samples-")?.strip_suffix(".seg")?.parse().ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// The writer of segments.
#[derive(Debug)]
pub(super) struct Segments {
    folder: PathBuf,
    /// Content of closed segments, by number.
    closed: BTreeMap<u64, Held>,
    number: u64,
    current: Option<Current>,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct Current {
    segment: Arc<Segment>,
    bytes: u64,
    held: Held,
}

/// What a segment contains, to decide when it can be removed.
#[derive(Debug, Default)]
struct Held {
    groups: HashSet<GroupId>,
    /// Number of the newest record that a frame belongs to. Segments of an earlier process
    /// precede any snapshot to come.
    newest: u64,
}

impl Held {
    /// Whether the segment can be removed after a snapshot of the records up to `seq`: it has no live group, and no
    /// frame of a later record, whose groups the snapshot does not know.
    fn is_dead(&self, live: &HashSet<GroupId>, seq: u64) -> bool {
        self.newest <= seq && self.groups.is_disjoint(live)
    }
}

impl Segments {
    /// Continues after the existing segments.
    pub(super) fn open(folder: &Path) -> Result<Self, FileError> {
        let mut closed = BTreeMap::new();
        for number in numbers(folder)? {
            let frames = scan(&segment_path(folder, number))?.frames;
            let groups = frames.into_iter().map(|(key, ..)| key.sample().group).collect();
            closed.insert(number, Held { groups, newest: 0 });
        }
        let number = closed.keys().next_back().copied().unwrap_or(0);
        Ok(Self { folder: folder.to_owned(), closed, number, current: None, buffer: Vec::new() })
    }

    /// Writes frames, with the numbers of their records, and makes them durable.
    pub(super) fn write(&mut self, frames: &[(u64, Frame)]) -> io::Result<()> {
        if frames.is_empty() {
            return Ok(());
        }
        let mut current = match self.current.take() {
            Some(current) => current,
            None => self.next()?,
        };
        let begin = current.bytes;
        if let Err(error) = fill(&mut current, &mut self.buffer, frames) {
            // After a full disk, the partial write is truncated and the file is used again; otherwise every try would
            // leave a file. After any other error the content of the file is unknown, so nothing is appended to it.
            if is_full(&error) && current.segment.file.set_len(begin).is_ok() {
                current.bytes = begin;
                self.current = Some(current);
            } else {
                self.closed.insert(self.number, current.held);
            }
            return Err(error);
        }
        let mut offset = begin;
        for (_, frame) in frames {
            frame.stored().written(&current.segment, offset, frame.body.len());
            offset += (HEADER_BYTES + frame.body.len()) as u64;
        }
        if current.bytes < SEGMENT_BYTES {
            self.current = Some(current);
        } else {
            self.closed.insert(self.number, current.held);
        }
        Ok(())
    }

    fn next(&mut self) -> io::Result<Current> {
        self.number += 1;
        let path = segment_path(&self.folder, self.number);
        let file = File::options().create_new(true).read(true).append(true).open(&path)?;
        // The folder is synced first, so that the name is durable before anything relies on the file's content.
        if let Err(error) = File::open(&self.folder).and_then(|folder| folder.sync_all()) {
            let _ = fs::remove_file(&path);
            return Err(error);
        }
        Ok(Current { segment: Arc::new(Segment { path, file }), bytes: 0, held: Held::default() })
    }

    /// Removes the segments that are no longer needed after a snapshot of the records up to `seq`.
    pub(super) fn retain(&mut self, live: &HashSet<GroupId>, seq: u64) -> io::Result<()> {
        // The current segment is closed first, so that it can be removed like the others.
        if let Some(current) = self.current.take_if(|current| current.bytes > 0 && current.held.is_dead(live, seq)) {
            self.closed.insert(self.number, current.held);
        }
        let dead = self.closed.iter().filter(|(_, held)| held.is_dead(live, seq));
        let dead: Vec<u64> = dead.map(|(number, _)| *number).collect();
        for number in dead {
            match fs::remove_file(segment_path(&self.folder, number)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => drop(self.closed.remove(&number)),
            }
        }
        Ok(())
    }
}

/// Appends frames to a segment, and makes them durable.
fn fill(current: &mut Current, buffer: &mut Vec<u8>, frames: &[(u64, Frame)]) -> io::Result<()> {
    buffer.clear();
    for (seq, frame) in frames {
        current.held.groups.insert(frame.key.sample().group);
        current.held.newest = current.held.newest.max(*seq);
        buffer.extend_from_slice(&frame.header());
        buffer.extend_from_slice(&frame.body);
        if buffer.len() >= BUFFER_BYTES {
            flush(current, buffer)?;
        }
    }
    flush(current, buffer)?;
    current.segment.file.sync_data()
}

fn flush(current: &mut Current, buffer: &mut Vec<u8>) -> io::Result<()> {
    (&current.segment.file).write_all(buffer)?;
    current.bytes += buffer.len() as u64;
    buffer.clear();
    Ok(())
}

/// Index of all samples and verdicts on disk.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    places: HashMap<FrameKey, StoredFrame>,
}

impl Frames {
    /// Reads and checks all segments. A torn tail left by a crash is truncated, with a note.
    pub(super) fn read(folder: &Path) -> Result<(Self, Vec<String>), FileError> {
        let (mut frames, mut notes) = (Self::default(), Vec::new());
        for number in numbers(folder)? {
            let path = segment_path(folder, number);
            let scanned = scan(&path)?;
            if scanned.damaged > 0 {
                let damaged = scanned.damaged;
                notes.push(format!(
                    "`{}`: {damaged} frames are damaged; their samples are generated again",
                    path.display()
                ));
            }
            if let Some(problem) = &scanned.problem {
                notes.push(format!(
                    "`{}`: {problem} at byte {} of {}; the rest is cut off",
                    path.display(),
                    scanned.sound,
                    scanned.bytes
                ));
                let file = File::options().write(true).open(&path).map_err(FileError::file("open", &path))?;
                file.set_len(scanned.sound).map_err(FileError::file("cut", &path))?;
                file.sync_all().map_err(FileError::file("sync", &path))?;
            }
            let file = File::open(&path).map_err(FileError::file("open", &path))?;
            let segment = Arc::new(Segment { path, file });
            for (key, offset, length) in scanned.frames {
                frames.places.insert(key, StoredFrame::at(&segment, offset - HEADER_BYTES as u64, length));
            }
        }
        Ok((frames, notes))
    }

    /// The place of a frame; `None` if there is none.
    pub(crate) fn stored(&self, key: FrameKey) -> Option<StoredFrame> {
        self.places.get(&key).cloned()
    }

    /// The content of a frame; `None` if there is none or it cannot be read.
    pub(crate) fn get(&self, key: FrameKey) -> Option<Vec<u8>> {
        let frame = self.stored(key)?;
        frame.read().inspect_err(|error| tracing::error!(sample = %key.sample(), "{error}")).ok()
    }

    /// Number of frames.
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }
}

/// Result of reading a segment.
struct Scanned {
    /// Key, offset of the body and length of the body of each frame.
    frames: Vec<(FrameKey, u64, usize)>,
    /// Bytes up to the end of the last whole frame.
    sound: u64,
    bytes: u64,
    /// What is wrong after them.
    problem: Option<&'static str>,
    /// Number of frames in between whose checksum does not match.
    damaged: usize,
}

fn scan(path: &Path) -> Result<Scanned, FileError> {
    let file = File::open(path).map_err(FileError::file("open", path))?;
    let bytes = file.metadata().map_err(FileError::file("read size of", path))?.len();
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut scanned = Scanned { frames: Vec::new(), sound: 0, bytes, problem: None, damaged: 0 };
    let mut header = [0; HEADER_BYTES];
    let mut body = Vec::new();
    while scanned.sound < bytes {
        let left = bytes - scanned.sound;
        if left < HEADER_BYTES as u64 {
            scanned.problem = Some("a torn frame");
            break;
        }
        reader.read_exact(&mut header).map_err(FileError::file("read", path))?;
        let Some((key, length, expected)) = read_header(&header) else {
            scanned.problem = Some("something that is no frame");
            break;
        };
        if left < (HEADER_BYTES + length) as u64 {
            scanned.problem = Some("a torn frame");
            break;
        }
        body.resize(length, 0);
        reader.read_exact(&mut body).map_err(FileError::file("read", path))?;
        let end = scanned.sound + (HEADER_BYTES + length) as u64;
        if checksum(&header[8..], &body) == expected {
            scanned.frames.push((key, scanned.sound + HEADER_BYTES as u64, length));
        // A wrong checksum at the very end is a torn write; anywhere else it is damage to a single frame.
        } else if end == bytes {
            scanned.problem = Some("a torn frame");
            break;
        } else {
            // Not a torn tail: the frames after it are intact.
            scanned.damaged += 1;
        }
        scanned.sound = end;
    }
    Ok(scanned)
}
