use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// What the hub says that a file's bytes hash to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Digest {
    /// SHA-256 of the bytes, of files that are kept outside of Git.
    Sha256(String),
    /// SHA-1 of a Git object with these bytes, of all others.
    Git(String),
}

impl Digest {
    /// Reads a digest: 64 hexadecimal digits, or the 40 of Git.
    #[must_use]
    pub fn of_hex(text: &str) -> Option<Self> {
        let is_hex = text.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c));
        match text.len() {
            64 if is_hex => Some(Self::Sha256(text.to_owned())),
            40 if is_hex => Some(Self::Git(text.to_owned())),
            _ => None,
        }
    }

    /// The digits, which are the name of the file in the cache.
    #[must_use]
    pub fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::Git(hex) => hex,
        }
    }

    /// Begins to compute the digest of a file of `length` bytes.
    pub(crate) fn hasher(&self, length: u64) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher(Context::new(&SHA256)),
            Self::Git(_) => {
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {length}\0").as_bytes());
                Hasher(context)
            }
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.hex())
    }
}

/// A digest in the making.
pub(crate) struct Hasher(Context);

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Adds what a file holds, and returns its length.
    pub(crate) fn update_from(&mut self, file: &mut File) -> io::Result<u64> {
        let mut buffer = vec![0; 1 << 20];
        let mut length = 0;
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(length),
                read => {
                    self.update(&buffer[..read]);
                    length += read as u64;
                }
            }
        }
    }

    pub(crate) fn hex(self) -> String {
        self.0.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// SHA-256 of a file, and its length.
pub(crate) fn sha256_of(path: &Path) -> io::Result<(String, u64)> {
    let mut hasher = Hasher(Context::new(&SHA256));
    let length = hasher.update_from(&mut File::open(path)?)?;
    Ok((hasher.hex(), length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_git_and_of_sha256sum() {
        // `printf 'hello\n' | git hash-object --stdin` and `printf 'hello\n' | sha256sum`.
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        for hex in [git, sha256] {
            let mut hasher = Digest::of_hex(hex).expect("a digest").hasher(6);
            hasher.update(b"hel");
            hasher.update(b"lo\n");
            assert_eq!(hasher.hex(), hex);
        }
        for text in ["", "xyz", &git[1..], "../../../etc/passwd", &git.to_uppercase()] {
            assert_eq!(Digest::of_hex(text), None, "{text}");
        }
    }
}
