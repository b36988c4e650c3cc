//! Tokens of limited life: an expiry time and its HMAC under a key that stays in the run folder.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::hmac;

/// Life of a token that is printed, in hours.
pub const TOKEN_HOURS: u64 = 12;

/// Length of a key in bytes.
const KEY_BYTES: usize = 32;
/// Longest token that is looked at; a valid one has 79 characters at most.
const MOST_TOKEN: usize = 128;

/// A key file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{doing} `{}`: {problem}", path.display())]
pub struct KeyError {
    path: PathBuf,
    doing: &'static str,
    problem: String,
}

/// Signs and checks tokens. Its bytes are secret: `Debug` does not print them.
#[derive(Clone)]
pub struct Key(hmac::Key);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// A key for this process only.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn random() -> io::Result<Self> {
        Ok(Self::of(&random_bytes()?))
    }

    /// The key of a run, made with mode 0600 when the file is not there. It outlives the process, so that a page stays
    /// signed in when the run is restarted.
    ///
    /// # Errors
    /// When the file cannot be read or made, belongs to another user or is open to others, or holds no key.
    pub fn of_file(path: &Path) -> Result<Self, KeyError> {
        let failed = |doing, error: &io::Error| KeyError { path: path.to_owned(), doing, problem: error.to_string() };
        match Self::read(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            read => return read.map_err(|error| failed("read the key of the dashboard in", &error)),
        }
        let bytes = random_bytes().map_err(|error| failed("make a key of the dashboard for", &error))?;
        let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let written = made.and_then(|mut file| {
            file.write_all(hex(&bytes).as_bytes())?;
            file.sync_all()
        });
        written.map_err(|error| failed("write a key of the dashboard to", &error))?;
        Ok(Self::of(&bytes))
    }

    /// The key in an existing file.
    ///
    /// # Errors
    /// As [`Self::of_file`]; a missing file is [`ErrorKind::NotFound`].
    pub fn read(path: &Path) -> io::Result<Self> {
        let file = std::fs::File::open(path)?;
        if file.metadata()?.mode() & 0o077 != 0 {
            return Err(io::Error::other("others may read it; set its mode to 0600, or remove it and restart the run"));
        }
        let mut text = String::new();
        file.take(1 << 10).read_to_string(&mut text)?;
        let bytes = unhex(text.trim()).filter(|bytes| bytes.len() == KEY_BYTES);
        let bytes =
            bytes.ok_or_else(|| io::Error::other("it holds no key; remove it, and a restart makes a new one"))?;
        Ok(Self::of(&bytes))
    }

    fn of(bytes: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, bytes))
    }

    /// A token that [`check`](Self::check) accepts for this long.
    #[must_use]
    pub fn token(&self, life: Duration) -> String {
        self.token_until(now() + life.as_secs())
    }

    fn token_until(&self, expiry: u64) -> String {
        format!("{expiry}.{}", hex(hmac::sign(&self.0, signed(expiry).as_bytes()).as_ref()))
    }

    /// Seconds that the token is still valid for; `None` for one that has expired or is not of this key. The signature
    /// is compared in constant time.
    #[must_use]
    pub fn check(&self, token: &str) -> Option<u64> {
        if token.len() > MOST_TOKEN {
            return None;
        }
        let (expiry, signature) = token.split_once('.')?;
        let (expiry, signature) = (expiry.parse::<u64>().ok()?, unhex(signature)?);
        hmac::verify(&self.0, signed(expiry).as_bytes(), &signature).ok()?;
        expiry.checked_sub(now()).filter(|left| *left > 0)
    }
}

/// The signed text. It names its purpose, so that no other signature under this key can be a token.
fn signed(expiry: u64) -> String {
    format!("pacs dashboard, read only, until {expiry}")
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn random_bytes() -> io::Result<[u8; KEY_BYTES]> {
    let mut bytes = [0; KEY_BYTES];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_token_is_valid_for_its_time_and_its_key_only() {
        let (key, other) = (Key::random().unwrap(), Key::random().unwrap());
        let token = key.token(Duration::from_secs(100));
        let left = key.check(&token).unwrap();
        assert!((90..=100).contains(&left), "{left}");
        assert_eq!(other.check(&token), None);
        let (expiry, signature) = token.split_once('.').unwrap();
        let later = expiry.parse::<u64>().unwrap() + 1;
        for forged in [
            String::new(),
            ".".into(),
            expiry.into(),
            format!("{expiry}."),
            format!("{later}.{signature}"),
            format!("{expiry}.{}", &signature[..62]),
            format!("{expiry}.{signature}00"),
            format!("+{expiry}.{}", "é".repeat(32)),
            "9".repeat(1 << 20),
        ] {
            assert_eq!(key.check(&forged), None, "{forged:.80}");
        }
        assert_eq!(key.check(&key.token_until(now() - 1)), None, "it has expired");
        assert_eq!(key.check(&key.token_until(now())), None, "it expires now");
    }

    #[test]
    fn the_key_of_a_folder_is_kept_and_is_its_owners_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dashboard.key");
        assert_eq!(Key::read(&path).unwrap_err().kind(), ErrorKind::NotFound);
        let token = Key::of_file(&path).unwrap().token(Duration::from_secs(60));
        assert!(Key::of_file(&path).unwrap().check(&token).is_some(), "a restart knows the tokens of before");
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = Key::of_file(&path).unwrap_err().to_string();
        assert!(error.contains("others may read it") && error.contains("dashboard.key"), "{error}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "short").unwrap();
        assert!(Key::of_file(&path).unwrap_err().to_string().contains("holds no key"));
    }
}
