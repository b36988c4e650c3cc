use std::io;
use std::path::{Path, PathBuf};

use pacs_spec::{HubKind, HubRepo};

/// Why something cannot be had from the hub, or brought to it.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A name that is none.
    #[error("{0}")]
    Name(String),
    /// A variable of the environment, or the token, that cannot be used.
    #[error("{what}: {message}")]
    Setting {
        /// Where it is from.
        what: String,
        /// What is wrong with it.
        message: String,
    },
    /// The hub does not have it, or does not show it to this user.
    #[error("{} {missing} of `{repo}`{}", endpoint_has_no(endpoint), shown_to(*has_token, missing))]
    NotFound {
        /// The repository that was asked for.
        repo: HubRepo,
        /// What of it.
        missing: Missing,
        /// The hub's address.
        endpoint: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// The owners ask for something before they give it out.
    #[error("`{repo}` is gated: its owners give access on {page}{}", if *has_token { "" } else { ", and it takes a token (HF_TOKEN)" })]
    Gated {
        /// The repository that was asked for.
        repo: HubRepo,
        /// Where to ask for access.
        page: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// The token is wrong, or does not allow this.
    #[error("the hub refuses this token for `{repo}` (status {status}): {message}")]
    Denied {
        /// The repository that was asked for.
        repo: HubRepo,
        /// Status code of the HTTP answer.
        status: u16,
        /// What the hub says.
        message: String,
    },
    /// Nothing is to be fetched, and the cache does not have it.
    #[error("HF_HUB_OFFLINE is set, and the cache `{}` does not have {what} of `{repo}`", cache.display())]
    Offline {
        /// The repository that was asked for.
        repo: HubRepo,
        /// What is missing.
        what: String,
        /// Root of the cache that was searched.
        cache: PathBuf,
    },
    /// The network, or a server, is not there.
    #[error("reach {host}: {reason}")]
    Unreachable {
        /// Host name of the server.
        host: String,
        /// Cause, such as a refused connection or a deadline.
        reason: String,
    },
    /// A server is overloaded, or fails.
    #[error("{host} answers with status {status}: {message}")]
    Busy {
        /// Host name of the server that answered, or did not.
        host: String,
        /// Status code of the HTTP answer.
        status: u16,
        /// What it says.
        message: String,
    },
    /// A server answers with something that is no answer.
    #[error("{host}: {message}")]
    Answer {
        /// Host name of the server that answered, or did not.
        host: String,
        /// What is wrong.
        message: String,
    },
    /// A file does not have the digest that the hub gives for it.
    #[error("`{file}` arrived with the digest {found}, and the hub says {expected}")]
    Mismatch {
        /// The file, within the repository.
        file: String,
        /// The digest that it should have.
        expected: String,
        /// The digest that it has.
        found: String,
    },
    /// The disk has no room for what is to be fetched.
    #[error("the disk of `{}` is full: {needed} bytes are needed, {free} are free", path.display())]
    DiskFull {
        /// Folder of the cache that has no room.
        path: PathBuf,
        /// Bytes that are still to be fetched.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// Another process has been fetching the same file for too long.
    #[error("another process has held `{}` for {seconds} s", path.display())]
    Locked {
        /// Path of the lock file that the other process holds.
        path: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// The repository has nothing that can be used here.
    #[error("`{repo}`: {message}")]
    Unusable {
        /// The repository that was asked for.
        repo: HubRepo,
        /// What is missing or unsupported.
        message: String,
    },
    /// A file of this machine.
    #[error("{doing} `{}`: {error}", path.display())]
    File {
        /// What was tried.
        doing: &'static str,
        /// File or folder of the failed operation.
        path: PathBuf,
        /// Why it failed.
        error: io::Error,
    },
}

/// What a repository does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Missing {
    /// The repository itself.
    Repo,
    /// A branch, tag or commit of it does not exist.
    Revision,
    /// The revision lacks this file.
    File(String),
}

impl std::fmt::Display for Missing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Repo => f.write_str("repository"),
            Self::Revision => f.write_str("such revision"),
            Self::File(name) => write!(f, "file `{name}`"),
        }
    }
}

fn endpoint_has_no(endpoint: &str) -> String {
    format!("{endpoint} has no")
}

fn shown_to(has_token: bool, missing: &Missing) -> &'static str {
    match (missing, has_token) {
        // Private repositories are not told apart from those that are not there.
        (Missing::Repo, true) => ", or does not show it to the owner of this token",
        (Missing::Repo, false) => ", or it is private and takes a token (HF_TOKEN)",
        _ => "",
    }
}

impl HubError {
    pub(crate) fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::File { doing, path: path.to_owned(), error }
    }

    /// Whether trying again later can help without anybody changing anything.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Busy { .. } | Self::DiskFull { .. } | Self::Locked { .. } => true,
            Self::Mismatch { .. } | Self::Answer { .. } => false,
            Self::File { error, .. } => {
                matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }

    /// What to do about it, where the error itself does not say it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NotFound { missing: Missing::Repo, .. } | Self::Denied { .. } => {
                "a token is read from HF_TOKEN, else from the file that `hf auth login` writes"
            }
            Self::Unreachable { .. } => {
                "without a network, `pacs fetch NAME` on a machine with one brings it into the cache (HF_HOME) that this one sees; \
                 HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy"
            }
            Self::Offline { .. } => {
                "`pacs fetch NAME` without HF_HUB_OFFLINE brings it; HF_HOME says where the cache is"
            }
            Self::DiskFull { .. } => "what was fetched is kept; HF_HOME puts the cache on another disk",
            Self::Mismatch { .. } => {
                "the file was removed; a proxy or mirror may have changed it (HF_ENDPOINT, HTTPS_PROXY)"
            }
            _ => return None,
        })
    }

    /// The page of a repository for people.
    pub(crate) fn page(endpoint: &str, repo: &HubRepo) -> String {
        let datasets = if repo.kind == HubKind::Dataset { "datasets/" } else { "" };
        format!("{endpoint}/{datasets}{}", repo.id)
    }
}
