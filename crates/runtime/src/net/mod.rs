//! Connections between processes: mutual TLS, or plain text within one machine.
//!
//! A certificate proves the role of its holder, not its host: the role is a name under `pacs.internal` among the DNS
//! names. So nodes need no certificates of their own, and a worker that moves keeps its identity. [`Security`] holds
//! the files, [`dial`] and [`accept`] use them for each new connection, and a [`Guard`] decides who may call a service.
//! Every call names the run of its caller ([`RunIdentity`]).

mod admission;
mod connection;
mod dial;
mod guard;
mod neighbour;
mod role;
mod run;
mod server;
mod service;
mod tls;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, ServerConfig};

pub(crate) use self::connection::accept_probes;
pub use self::connection::{Connection, Peer, accept};
pub(crate) use self::dial::dial_any;
pub use self::dial::{DialError, dial};
pub use self::guard::{Guard, RunGate};
pub use self::role::PeerRole;
pub(crate) use self::run::run_of_refusal;
pub use self::run::{Caller, NoRunId, RUN_ID_KEY, RunChannel, RunIdentity, is_run_id, of_run};
pub use self::server::{Called, server};
pub use self::service::{Trust, service_channel};
pub use self::tls::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, TlsError, check_role};

use self::tls::Tls;

/// Protection of a process's connections.
#[derive(Clone, Default)]
pub enum Security {
    /// Plain text, between addresses of the loopback interface only.
    #[default]
    Plain,
    /// Mutual TLS with certificates from files.
    Mutual(Arc<Tls>),
}

impl Security {
    /// Mutual TLS with the files `ca.crt`, `tls.crt` and `tls.key` in `folder`, which must be those of `role`.
    /// `folder` may also be a single file with the certificate, the authority's and the key. The files are
    /// read again when they change.
    ///
    /// # Errors
    /// When a file is missing or invalid, the key is readable by others, or the certificate has expired or is another role's.
    pub fn mutual(folder: &Path, role: PeerRole) -> Result<Self, TlsError> {
        Tls::load(folder, role).map(|tls| Self::Mutual(Arc::new(tls)))
    }

    /// Checks that listening at `address` does not allow plain text from other machines.
    ///
    /// # Errors
    /// When it would.
    pub fn check_listen(&self, address: SocketAddr) -> Result<(), PlainText> {
        match self {
            Self::Plain if !address.ip().is_loopback() => Err(PlainText { address: address.to_string() }),
            Self::Plain | Self::Mutual(_) => Ok(()),
        }
    }

    /// The current TLS configurations for connections that do not carry gRPC: as a client, and as a server that
    /// requires a certificate. The client verifies the name of a role ([`PeerRole::dns_name`]); [`check_role`] decides
    /// which peers a server admits.
    #[must_use]
    pub fn rustls(&self) -> Option<(Arc<ClientConfig>, Arc<ServerConfig>)> {
        match self {
            Self::Plain => None,
            Self::Mutual(tls) => Some((tls.client(), tls.server())),
        }
    }

    /// Time until this process's certificate expires; `None` in plain text.
    #[must_use]
    pub fn valid_for(&self) -> Option<Duration> {
        match self {
            Self::Plain => None,
            Self::Mutual(tls) => Some(tls.valid_for()),
        }
    }

    /// The folder of the certificates; `None` in plain text.
    #[must_use]
    pub fn folder(&self) -> Option<PathBuf> {
        match self {
            Self::Plain => None,
            Self::Mutual(tls) => Some(tls.folder().to_owned()),
        }
    }
}

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => f.write_str("Plain"),
            Self::Mutual(tls) => write!(f, "Mutual({})", tls.folder().display()),
        }
    }
}

/// Plain text would leave the machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{address} is not on this machine's loopback interface, and plain text never leaves the machine; give --tls-dir DIR \
         (`pacs certs` makes the files)"
)]
pub struct PlainText {
    /// The address as given.
    pub address: String,
}
