//! Text files as they are found: packed or not, with a byte order mark or without, and anything else refused with a reason.

use std::fs::File;
use std::io::{BufRead, BufReader, Chain, Cursor, Read};
use std::path::Path;

use crate::DataError;

/// What a file says of itself by its first bytes.
const GZIP: &[u8] = b"\x1f\x8b";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
const MARK: &[u8] = b"\xef\xbb\xbf";
/// Bytes that are looked at.
const LOOKED_AT: usize = 64;

/// Opens a text file, unpacked whatever its name is, without its byte order mark.
///
/// # Errors
/// When it cannot be opened, or is no text.
pub fn open(path: &Path) -> Result<Box<dyn BufRead>, DataError> {
    let file = File::open(path).map_err(|error| read_error(path, error))?;
    let (start, file) = peek(file, path)?;
    if start.starts_with(GZIP) {
        return unpacked(Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(file))), path);
    }
    if start.starts_with(ZSTD) {
        let decoder = zstd::stream::read::Decoder::new(file).map_err(|error| read_error(path, error))?;
        return unpacked(Box::new(BufReader::new(decoder)), path);
    }
    unpacked(Box::new(BufReader::new(file)), path)
}

/// Text without its byte order mark; what cannot be read as lines of text is refused.
pub(crate) fn unpacked<'a>(reader: Box<dyn BufRead + 'a>, path: &Path) -> Result<Box<dyn BufRead + 'a>, DataError> {
    let (mut start, reader) = peek(reader, path)?;
    let is = |message: &str| Err(DataError::Format { path: path.to_owned(), message: message.to_owned() });
    if start.starts_with(b"\xff\xfe") || start.starts_with(b"\xfe\xff") || start.get(1) == Some(&0) {
        return is("it is UTF-16 text; save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`)");
    }
    if start.starts_with(b"version https://git-lfs.github.com/") {
        return is("it is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`");
    }
    if start.starts_with(b"PAR1") {
        return is("it is a Parquet file; name it `.parquet`");
    }
    if start.starts_with(b"PK\x03\x04") || start.starts_with(b"BZh") || start.starts_with(b"\xfd7zXZ") {
        return is("it is packed in a way that is not read; unpack it, or pack it with gzip or zstd");
    }
    if start.trim_ascii_start().starts_with(b"<") {
        return is("it is a page of HTML or XML, perhaps the answer of a site that asks for a login, and not data");
    }
    let skipped = if start.starts_with(MARK) { MARK.len() } else { 0 };
    let mut reader = BufReader::new(reader);
    reader.read_exact(&mut start[..skipped]).map_err(|error| read_error(path, error))?;
    Ok(Box::new(reader))
}

/// A reader whose first bytes were looked at, from its beginning.
type Peeked<R> = Chain<Cursor<Vec<u8>>, R>;

/// The first bytes of a reader, and the whole of it.
fn peek<R: Read>(mut reader: R, path: &Path) -> Result<(Vec<u8>, Peeked<R>), DataError> {
    let mut start = Vec::new();
    reader.by_ref().take(LOOKED_AT as u64).read_to_end(&mut start).map_err(|error| read_error(path, error))?;
    Ok((start.clone(), Cursor::new(start).chain(reader)))
}

pub(crate) fn read_error(path: &Path, error: std::io::Error) -> DataError {
    DataError::Read { path: path.to_owned(), error }
}
