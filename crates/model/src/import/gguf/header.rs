//! A walk over the header of a GGUF file, before anything believes a length in it.

use std::io::{self, Read};

/// Arrays may be within arrays as deep as this; none of a real file are.
const MOST_DEPTH: u32 = 4;

/// Dimensions of a tensor, as ggml has them.
const MOST_DIMENSIONS: u32 = 4;

/// Longest name or key; ggml's are below 64 bytes, and some tools' longer.
const MOST_NAME: u64 = 65_535;

/// Elements that a byte of a file may stand for: quantisations of about one bit.
const ELEMENTS_PER_BYTE: u64 = 16;

/// Types of values that have a number.
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Checks that the header, whose first four bytes were read, lies within a file of `length` bytes, whatever it claims.
pub(super) fn check(reader: &mut impl Read, length: u64) -> Result<(), String> {
    let mut walk = Walk { reader, left: length.saturating_sub(4), length, wide: true };
    let version = walk.u32()?;
    walk.wide = match version {
        1 => false,
        2 | 3 => true,
        other => return Err(format!("version {other} is not known")),
    };
    let (tensors, entries) = (walk.count()?, walk.count()?);
    for _ in 0..entries {
        walk.name()?;
        let kind = walk.u32()?;
        walk.value(kind, 0)?;
    }
    for _ in 0..tensors {
        walk.tensor()?;
    }
    Ok(())
}

struct Walk<'a, R> {
    reader: &'a mut R,
    /// Bytes of the file that were not read yet.
    left: u64,
    length: u64,
    /// Lengths have 64 bits, and not 32.
    wide: bool,
}

impl<R: Read> Walk<'_, R> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N as u64)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.bytes().map(u64::from_le_bytes)
    }

    /// A number of things of at least a byte each.
    fn count(&mut self) -> Result<u64, String> {
        let count = if self.wide { self.u64()? } else { u64::from(self.u32()?) };
        match count <= self.left {
            true => Ok(count),
            false => Err(format!("it claims {count} things in the {} bytes that are left of it", self.left)),
        }
    }

    fn take(&mut self, bytes: u64) -> Result<(), String> {
        self.left = self.left.checked_sub(bytes).ok_or_else(|| "its header ends beyond it".to_owned())?;
        Ok(())
    }

    fn skip(&mut self, bytes: u64) -> Result<(), String> {
        self.take(bytes)?;
        let skipped =
            io::copy(&mut self.reader.by_ref().take(bytes), &mut io::sink()).map_err(|error| error.to_string())?;
        if skipped == bytes { Ok(()) } else { Err("its header ends beyond it".to_owned()) }
    }

    fn name(&mut self) -> Result<(), String> {
        let length = self.count()?;
        if length > MOST_NAME {
            return Err(format!("a name has {length} bytes"));
        }
        self.skip(length)
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<(), String> {
        match kind {
            STRING => {
                let length = self.count()?;
                self.skip(length)
            }
            ARRAY if depth >= MOST_DEPTH => Err(format!("arrays are nested deeper than {MOST_DEPTH}")),
            ARRAY => {
                let kind = self.u32()?;
                let count = self.count()?;
                match size(kind) {
                    Some(size) => {
                        let bytes = count.checked_mul(size).ok_or("an array has more bytes than there are numbers")?;
                        self.skip(bytes)
                    }
                    None => (0..count).try_for_each(|_| self.value(kind, depth + 1)),
                }
            }
            other => match size(other) {
                Some(size) => self.skip(size),
                None => Err(format!("value type {other} is not known")),
            },
        }
    }

    fn tensor(&mut self) -> Result<(), String> {
        self.name()?;
        let dimensions = self.u32()?;
        if !(1..=MOST_DIMENSIONS).contains(&dimensions) {
            return Err(format!("a tensor has {dimensions} dimensions"));
        }
        let mut elements = 1u64;
        for _ in 0..dimensions {
            let size = if self.wide { self.u64()? } else { u64::from(self.u32()?) };
            let most = self.length.saturating_mul(ELEMENTS_PER_BYTE);
            elements = elements
                .checked_mul(size)
                .filter(|elements| *elements <= most)
                .ok_or_else(|| format!("a tensor has more elements than {} bytes can hold", self.length))?;
        }
        // Its type and where it is.
        self.skip(4 + 8)
    }
}

/// Bytes of a value whose type says them.
fn size(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header after its magic: version, numbers of tensors and entries, and what follows.
    fn header(tensors: u64, entries: u64, rest: &[&[u8]]) -> Vec<u8> {
        let mut bytes = 3u32.to_le_bytes().to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        rest.iter().for_each(|part| bytes.extend_from_slice(part));
        bytes
    }

    fn checked(bytes: &[u8]) -> Result<(), String> {
        check(&mut &bytes[..], 4 + bytes.len() as u64)
    }

    #[test]
    fn no_length_is_believed() {
        let (huge, one) = (&u64::MAX.to_le_bytes()[..], &1u64.to_le_bytes()[..]);
        let kind = |kind: u32| kind.to_le_bytes();
        let key: [&[u8]; 2] = [one, b"k"];
        for (bytes, said) in [
            (header(u64::MAX, 0, &[]), "it claims"),
            (header(0, u64::MAX, &[]), "it claims"),
            (header(0, 1, &[huge]), "it claims"),
            (header(0, 1, &[key[0], key[1], &kind(STRING), huge]), "it claims"),
            (header(0, 1, &[key[0], key[1], &kind(ARRAY), &kind(4), huge]), "it claims"),
            (header(0, 1, &[key[0], key[1], &kind(ARRAY), &kind(12), &9u64.to_le_bytes(), &[0; 16]]), "ends beyond"),
            (header(0, 1, &[key[0], key[1], &kind(99)]), "is not known"),
            (header(1, 0, &[key[0], key[1], &kind(0)]), "0 dimensions"),
            (header(1, 0, &[key[0], key[1], &kind(u32::MAX)]), "dimensions"),
            (header(1, 0, &[key[0], key[1], &kind(2), huge, huge]), "more elements"),
            (header(1, 0, &[key[0], key[1], &kind(1), &(1u64 << 40).to_le_bytes()]), "more elements"),
            (7u32.to_le_bytes().to_vec(), "version 7"),
            (Vec::new(), "ends beyond"),
        ] {
            let error = checked(&bytes).expect_err(said);
            assert!(error.contains(said), "{said}: {error}");
        }
    }

    #[test]
    fn arrays_within_arrays_end() {
        let mut rest: Vec<Vec<u8>> = vec![1u64.to_le_bytes().to_vec(), b"k".to_vec(), ARRAY.to_le_bytes().to_vec()];
        for _ in 0..100_000 {
            rest.push(ARRAY.to_le_bytes().to_vec());
            rest.push(1u64.to_le_bytes().to_vec());
        }
        let rest: Vec<&[u8]> = rest.iter().map(Vec::as_slice).collect();
        assert!(checked(&header(0, 1, &rest)).expect_err("deep").contains("nested deeper"));
    }

    /// Whatever single byte of a good header is another one, the walk ends with an answer.
    #[test]
    fn every_damage_has_an_answer() {
        let one = &1u64.to_le_bytes()[..];
        let good = header(
            1,
            2,
            &[
                one,
                b"a",
                &STRING.to_le_bytes(),
                one,
                b"x",
                one,
                b"b",
                &ARRAY.to_le_bytes(),
                &4u32.to_le_bytes(),
                one,
                &[0; 4],
                one,
                b"t",
                &1u32.to_le_bytes(),
                one,
                &[0; 12],
            ],
        );
        checked(&good).expect("good");
        for position in 0..good.len() {
            for byte in [0, 1, 7, 0x7f, 0x80, 0xff] {
                let mut damaged = good.clone();
                damaged[position] = byte;
                let _ = checked(&damaged);
                let _ = checked(&damaged[..position]);
            }
        }
    }
}
