//! Connections to services outside of this project.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tonic::transport::Channel;

use super::dial::{CONNECT_DEADLINE, DialError, Within, connect, endpoint};
use super::tls::{TlsError, of_authorities};

/// Protection of the connection to a service.
#[derive(Clone)]
pub enum Trust {
    /// Plain text on the loopback interface only; the function makes the error text for another address.
    Loopback(fn(String) -> String),
    /// Plain text to any address.
    PlainText,
    /// TLS: the service must show a certificate for the host of its address, signed by one of these authorities.
    Authorities(Arc<ClientConfig>),
}

impl Trust {
    /// TLS with the authorities in a PEM file.
    ///
    /// # Errors
    /// When the file cannot be read or holds no certificates.
    pub fn in_file(path: &Path) -> Result<Self, TlsError> {
        of_authorities(path).map(Self::Authorities)
    }
}

/// A lazy channel to the service at `address` (host:port), which reconnects whenever the connection is lost. Calls fail
/// with UNAVAILABLE while there is no connection.
///
/// Must be called within a runtime.
///
/// # Errors
/// When the address is malformed.
pub fn service_channel(address: &str, trust: &Trust) -> Result<Channel, DialError> {
    let endpoint = endpoint(address)?.connect_timeout(CONNECT_DEADLINE);
    let (config, within) = match trust {
        // No check of the user: a service may run under a user of its own.
        Trust::Loopback(elsewhere) => (None, Some(Within { elsewhere: *elsewhere, check: |_, _| Ok(()) })),
        Trust::PlainText => (None, None),
        Trust::Authorities(config) => (Some(config), None),
    };
    let tls = match config {
        Some(config) => {
            let host = endpoint.uri().host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            let name = ServerName::try_from(host).map_err(|_| DialError::Address(address.to_owned()))?;
            Some((Arc::clone(config), name))
        }
        None => None,
    };
    let address = Arc::<str>::from(address);
    let connector = tower::service_fn(move |_| {
        let (address, tls) = (Arc::clone(&address), tls.clone());
        async move {
            let attempt = tokio::time::timeout(CONNECT_DEADLINE, connect(&address, within, tls));
            attempt.await.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
        }
    });
    Ok(endpoint.tcp_nodelay(true).http2_keep_alive_interval(KEEP_ALIVE).connect_with_connector_lazy(connector))
}

/// Interval of keep-alive pings to a silent service.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
