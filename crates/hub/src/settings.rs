use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Uri;

use crate::HubError;

/// Where the hub is when the environment does not say.
const ENDPOINT: &str = "https://huggingface.co";

/// Where the hub and its cache are, and how long to wait for them. The environment has the names that all programs of the hub use.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Address without a slash at the end: `HF_ENDPOINT`, else <https://huggingface.co>.
    pub endpoint: String,
    /// Folder of the cache: `HF_HUB_CACHE`, else `hub` in `HF_HOME`, else in `huggingface` of the user's folder of caches.
    pub cache: PathBuf,
    /// `HF_TOKEN`, else the file `HF_TOKEN_PATH`, else `token` in `HF_HOME`.
    pub token: Option<Token>,
    /// Fetch nothing (`HF_HUB_OFFLINE`): what is in the cache is all there is.
    pub offline: bool,
    /// Proxy for connections with TLS: `HTTPS_PROXY`, else `ALL_PROXY`, but for hosts of `NO_PROXY`.
    pub proxy: Option<String>,
    /// Hosts, and ends of their names, that are reached without the proxy.
    pub no_proxy: Vec<String>,
    /// PEM file of authorities that are trusted besides those of the Mozilla list: `SSL_CERT_FILE`.
    pub authorities: Option<PathBuf>,
    /// How long to wait.
    pub patience: Patience,
}

/// How long to wait for a server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Patience {
    /// Name, connection and TLS.
    pub connect: Duration,
    /// The head of an answer.
    pub answer: Duration,
    /// The next piece of a body, either way.
    pub silence: Duration,
    /// Tries without a byte of progress.
    pub tries: u32,
    /// Before the second try; it doubles from try to try, up to 30 s. A server may ask for up to 60 s.
    pub pause: Duration,
    /// Another process that fetches the same file.
    pub lock: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            connect: seconds(10),
            answer: seconds(60),
            silence: seconds(30),
            tries: 5,
            pause: seconds(1),
            lock: seconds(3600),
        }
    }
}

/// A user's secret, which no output shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// A token as a header can carry it; `None` when it is empty or holds anything else.
    #[must_use]
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        let is_plain = !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic());
        is_plain.then(|| Self(text.to_owned()))
    }

    pub(crate) fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl Settings {
    /// Those of this process's environment.
    ///
    /// # Errors
    /// When a variable, or the token's file, cannot be used.
    pub fn from_env() -> Result<Self, HubError> {
        Self::of(|name| std::env::var(name).ok())
    }

    /// Those of an environment, whose variables `variable` knows. A variable that is empty counts as not set.
    ///
    /// # Errors
    /// When a variable, or the token's file, cannot be used.
    pub fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let first = |names: &[&str]| names.iter().find_map(|name| variable(name));
        let home = variable("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let caches = variable("XDG_CACHE_HOME").map(PathBuf::from);
            let caches = caches.unwrap_or_else(|| Path::new(&variable("HOME").unwrap_or_default()).join(".cache"));
            caches.join("huggingface")
        });
        let cache = first(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).map(PathBuf::from);
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = endpoint.trim().trim_end_matches('/').to_owned();
        check_endpoint(&endpoint)?;
        let is_on = |name: &str| {
            variable(name).is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str()))
        };
        let hosts = first(&["NO_PROXY", "no_proxy"]).unwrap_or_default();
        Ok(Self {
            endpoint,
            cache: cache.unwrap_or_else(|| home.join("hub")),
            token: token(variable("HF_TOKEN"), variable("HF_TOKEN_PATH").map(PathBuf::from), &home)?,
            offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
            proxy: first(&["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]),
            no_proxy: hosts.split(',').map(|host| host.trim().to_owned()).filter(|host| !host.is_empty()).collect(),
            authorities: variable("SSL_CERT_FILE").map(PathBuf::from),
            patience: Patience::default(),
        })
    }
}

fn check_endpoint(endpoint: &str) -> Result<(), HubError> {
    let address: Option<Uri> = endpoint.parse().ok();
    let is_one = address.is_some_and(|address| {
        let is_web = matches!(address.scheme_str(), Some("http" | "https"));
        is_web
            && address.authority().is_some_and(|authority| !authority.as_str().contains('@'))
            && address.query().is_none()
    });
    if is_one {
        return Ok(());
    }
    let message = format!("`{endpoint}` is no address such as {ENDPOINT}");
    Err(HubError::Setting { what: "HF_ENDPOINT".to_owned(), message })
}

fn token(given: Option<String>, path: Option<PathBuf>, home: &Path) -> Result<Option<Token>, HubError> {
    // What it holds must not get into a message.
    let parse = |what: String, text: &str| {
        let message = "it holds no token: one word of printable ASCII is expected".to_owned();
        Token::new(text).map(Some).ok_or(HubError::Setting { what, message })
    };
    if let Some(text) = given {
        return parse("HF_TOKEN".to_owned(), &text);
    }
    let path = path.unwrap_or_else(|| home.join("token"));
    match fs::read_to_string(&path) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) => parse(format!("the token's file `{}`", path.display()), &text),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(HubError::File { doing: "read the token's file", path, error }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, HubError> {
        let variables = variables.to_owned();
        Settings::of(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn folders_are_looked_for_as_other_programs_of_the_hub_do() {
        for (variables, cache) in [
            (&[("HOME", "/home/a")][..], "/home/a/.cache/huggingface/hub"),
            (&[("HOME", "/home/a"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HOME", "/home/a"), ("HF_HOME", "/h")], "/h/hub"),
            (&[("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/old"),
            (&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c"), ("HUGGINGFACE_HUB_CACHE", "/old")], "/c"),
            (&[("HF_HOME", " "), ("HOME", "/home/a")], "/home/a/.cache/huggingface/hub"),
        ] {
            assert_eq!(settings(variables).expect("settings").cache, Path::new(cache), "{variables:?}");
        }
    }

    #[test]
    fn a_token_is_read_from_the_environment_then_from_its_file_and_never_shown() {
        let home = tempfile::tempdir().expect("a folder");
        let dir = home.path().display().to_string();
        let secret = |variables: &[(&str, &str)]| settings(variables).map(|s| s.token.map(|t| t.secret().to_owned()));
        assert_eq!(secret(&[("HF_HOME", &dir)]).expect("settings"), None);
        fs::write(home.path().join("token"), "hf_file\n").expect("written");
        assert_eq!(secret(&[("HF_HOME", &dir)]).expect("settings").as_deref(), Some("hf_file"));
        let both = [("HF_HOME", dir.as_str()), ("HF_TOKEN", "hf_env")];
        assert_eq!(secret(&both).expect("settings").as_deref(), Some("hf_env"));
        let shown = format!("{:?}", settings(&both).expect("settings"));
        assert!(!shown.contains("hf_env"), "{shown}");
        let wrong = settings(&[("HF_TOKEN", "hf_secret\r\nHost: x")]).expect_err("no token").to_string();
        assert!(wrong.contains("HF_TOKEN") && !wrong.contains("secret"), "{wrong}");
    }

    #[test]
    fn offline_endpoint_and_proxy() {
        for (value, offline) in [("1", true), ("TRUE", true), ("yes", true), ("0", false), ("", false), ("off", false)]
        {
            assert_eq!(settings(&[("HF_HUB_OFFLINE", value)]).expect("settings").offline, offline, "{value}");
        }
        let given =
            settings(&[("HF_ENDPOINT", "https://mirror.example/"), ("NO_PROXY", "a.example, .b")]).expect("settings");
        assert_eq!(given.endpoint, "https://mirror.example");
        assert_eq!(given.no_proxy, ["a.example", ".b"]);
        for endpoint in ["mirror", "ftp://x", "https://", "https://user:pw@x", "https://x/?q"] {
            let refused = settings(&[("HF_ENDPOINT", endpoint)]).expect_err("no address").to_string();
            assert!(refused.contains("HF_ENDPOINT"), "{endpoint}: {refused}");
        }
    }
}
