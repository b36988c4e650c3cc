//! Reads frames back during the run.
//!
//! Every sample is in the journal before anyone hears of it, so memory holds only its place: the content is read when
//! the sample is judged, trained on or archived, mostly from the page cache. A segment that is removed meanwhile stays
//! readable for as long as one of its frames is held.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use super::frame::{HEADER_BYTES, checksum, read_header};

/// A segment that is open for reading.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) path: PathBuf,
    pub(super) file: File,
}

/// Position of a frame and length of its body.
#[derive(Debug)]
struct Place {
    segment: Arc<Segment>,
    offset: u64,
    length: usize,
}

/// A frame that is on disk or about to be. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct StoredFrame(Arc<OnceLock<Place>>);

/// Why a frame cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    /// It was read before it was durable.
    #[error("it is not on the disk yet")]
    Unwritten,
    /// The file system refused, perhaps only for now.
    #[error("read `{}` at byte {offset}: {error}", path.display())]
    File { path: PathBuf, offset: u64, error: io::Error },
    /// The checksum does not match.
    #[error("`{}` is damaged at byte {offset}", path.display())]
    Damaged { path: PathBuf, offset: u64 },
}

impl StoredFrame {
    /// A frame at a known position of a segment.
    pub(super) fn at(segment: &Arc<Segment>, offset: u64, length: usize) -> Self {
        let frame = Self::default();
        frame.written(segment, offset, length);
        frame
    }

    /// Sets the position of the frame, once it is durable.
    pub(super) fn written(&self, segment: &Arc<Segment>, offset: u64, length: usize) {
        // Set once: a batch that is retried was not set before.
        let _ = self.0.set(Place { segment: Arc::clone(segment), offset, length });
    }

    /// Reads the content and verifies its checksum.
    pub(crate) fn read(&self) -> Result<Vec<u8>, ReadError> {
        let Place { segment, offset, length } = self.0.get().ok_or(ReadError::Unwritten)?;
        let (path, offset) = (|| segment.path.clone(), *offset);
        let mut frame = vec![0; HEADER_BYTES + length];
        segment.file.read_exact_at(&mut frame, offset).map_err(|error| ReadError::File {
            path: path(),
            offset,
            error,
        })?;
        let sound = frame.split_first_chunk::<HEADER_BYTES>().and_then(|(header, body)| {
            let (_, written, expected) = read_header(header)?;
            (written == body.len() && checksum(&header[8..], body) == expected).then_some(())
        });
        sound.ok_or_else(|| ReadError::Damaged { path: path(), offset })?;
        frame.drain(..HEADER_BYTES);
        Ok(frame)
    }
}

#[cfg(test)]
mod tests {
    use pacs_types::{GroupId, LeaseId, SampleId};

    use super::super::frame::{Frame, FrameKey};
    use super::super::segments::Segments;
    use super::*;

    fn frames(bodies: &[&[u8]]) -> Vec<(u64, Frame)> {
        let key = |index| FrameKey::Sample(SampleId { group: GroupId(3), index }, LeaseId(1));
        (0..).zip(bodies).map(|(index, body)| (1, Frame::new(key(index), body.to_vec()))).collect()
    }

    #[test]
    fn a_frame_is_read_where_it_was_written_even_after_its_segment_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let mut segments = Segments::open(folder.path()).unwrap();
        let (first, second) = (frames(&[b"one", b""]), frames(&[b"three"]));
        let stored: Vec<StoredFrame> = first.iter().chain(&second).map(|(_, frame)| frame.stored()).collect();
        assert!(matches!(stored[0].read(), Err(ReadError::Unwritten)));
        segments.write(&first).unwrap();
        segments.write(&second).unwrap();
        // The group is no longer needed: its file is removed, but held frames stay readable.
        segments.retain(&std::collections::HashSet::new(), 1).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let read: Vec<Vec<u8>> = stored.iter().map(|frame| frame.read().unwrap()).collect();
        assert_eq!(read, [b"one".to_vec(), Vec::new(), b"three".to_vec()]);
    }

    #[test]
    fn damage_is_named_and_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let mut segments = Segments::open(folder.path()).unwrap();
        let written = frames(&[b"one", b"two"]);
        segments.write(&written).unwrap();
        let path = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(b"x", HEADER_BYTES as u64 + 1).unwrap();
        assert!(matches!(written[0].1.stored().read(), Err(ReadError::Damaged { offset: 0, .. })));
        assert_eq!(written[1].1.stored().read().unwrap(), b"two");
        file.set_len(HEADER_BYTES as u64 + 4).unwrap();
        assert!(matches!(written[1].1.stored().read(), Err(ReadError::File { .. })));
    }
}
