use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame, SizeHint};

/// Bytes that are read of a file at once.
const PIECE: u64 = 1 << 20;

/// The body of a request.
pub(crate) enum Payload {
    /// A request without a body.
    None,
    /// A body in memory, sent with its length.
    Text {
        /// What of it is not sent yet.
        bytes: Bytes,
        /// The whole of it.
        whole: Bytes,
        /// How much is sent.
        sent: Sent,
    },
    /// A part of a file, which is opened when it is needed: a body must not change between two tries.
    Part {
        /// File whose bytes are the body.
        path: PathBuf,
        /// Its first byte that is sent.
        start: u64,
        /// How many are sent.
        length: u64,
        /// The file, once it is open, and what is left.
        open: Option<(File, u64)>,
        /// How much is sent.
        sent: Sent,
    },
}

/// Counts the bytes of a body that are on their way.
#[derive(Clone, Default)]
pub(crate) struct Sent(Arc<AtomicU64>);

impl Sent {
    pub(crate) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Payload {
    pub(crate) fn text(text: String) -> Self {
        let whole = Bytes::from(text);
        Self::Text { bytes: whole.clone(), whole, sent: Sent::default() }
    }

    pub(crate) fn part(path: PathBuf, start: u64, length: u64) -> Self {
        Self::Part { path, start, length, open: None, sent: Sent::default() }
    }

    /// The same body from its beginning.
    pub(crate) fn again(&mut self) -> Self {
        match self {
            Self::None => Self::None,
            Self::Text { whole, .. } => {
                Self::Text { bytes: whole.clone(), whole: whole.clone(), sent: Sent::default() }
            }
            Self::Part { path, start, length, .. } => Self::part(path.clone(), *start, *length),
        }
    }

    pub(crate) fn progress(&self) -> Sent {
        match self {
            Self::None => Sent::default(),
            Self::Text { sent, .. } | Self::Part { sent, .. } => sent.clone(),
        }
    }

    /// What stands in `Content-Length`.
    pub(crate) fn length(&self) -> Option<u64> {
        match self {
            Self::None => None,
            Self::Text { whole, .. } => Some(whole.len() as u64),
            Self::Part { length, .. } => Some(*length),
        }
    }
}

impl Body for Payload {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        let piece = match self.get_mut() {
            Self::None => return Poll::Ready(None),
            Self::Text { bytes, .. } if bytes.is_empty() => return Poll::Ready(None),
            Self::Text { bytes, sent, .. } => {
                let piece = bytes.split_to(bytes.len().min(PIECE as usize));
                sent.add(piece.len());
                Ok(piece)
            }
            Self::Part { path, start, length, open, sent } => {
                let mut read = || {
                    if open.is_none() {
                        let mut file = File::open(&*path)?;
                        file.seek(SeekFrom::Start(*start))?;
                        *open = Some((file, *length));
                    }
                    let Some((file, left)) = open.as_mut() else { return Ok(Bytes::new()) };
                    let mut piece = vec![0; PIECE.min(*left) as usize];
                    // Files of models lie on local disks; a thread for each read would cost more than it.
                    file.read_exact(&mut piece)?;
                    *left -= piece.len() as u64;
                    sent.add(piece.len());
                    Ok(Bytes::from(piece))
                };
                let piece: Result<Bytes, std::io::Error> = read();
                match piece {
                    Ok(piece) if piece.is_empty() => return Poll::Ready(None),
                    other => other,
                }
            }
        };
        Poll::Ready(Some(piece.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::None => true,
            Self::Text { bytes, .. } => bytes.is_empty(),
            Self::Part { length, open, .. } => *length == 0 || open.as_ref().is_some_and(|(_, left)| *left == 0),
        }
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(match self {
            Self::None => 0,
            Self::Text { bytes, .. } => bytes.len() as u64,
            Self::Part { length, open, .. } => open.as_ref().map_or(*length, |(_, left)| *left),
        })
    }
}
