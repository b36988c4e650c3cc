//! Outgoing connections: name lookup, TLS and deadlines.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use super::{PeerRole, PlainText, RunChannel, RunIdentity, Security, neighbour, of_run};
use crate::launch;

/// Deadline of one attempt to connect.
pub(super) const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Deadline of a whole dial, with name lookups and all attempts.
const DIAL_DEADLINE: Duration = Duration::from_secs(15);

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The address is malformed.
    #[error("address `{0}` is not host:port")]
    Address(String),
    /// It would leave the machine in plain text.
    #[error(transparent)]
    PlainText(#[from] PlainText),
    /// No answer, or an unexpected one; another try may succeed.
    #[error("{0}")]
    Unreachable(String),
}

/// Connects once to the process of role `peer` at `address` (host:port), for calls that belong to `run`. A run that is
/// not known yet is not named, which only registration accepts.
///
/// # Errors
/// [`DialError::Address`] and [`DialError::PlainText`] are final; after [`DialError::Unreachable`] another try may succeed.
pub async fn dial(
    address: &str,
    peer: PeerRole,
    security: &Security,
    run: &RunIdentity,
) -> Result<RunChannel, DialError> {
    Ok(of_run(dial_any(address, peer, security).await?, run.clone()))
}

/// The same for calls that belong to no run, as operators make them. `address` may also be a run
/// folder (see [`launch::find`]), which is read for every connection, so that a channel follows a
/// coordinator that restarts elsewhere.
pub(crate) async fn dial_any(address: &str, peer: PeerRole, security: &Security) -> Result<Channel, DialError> {
    let found = launch::find(address).map_err(|error| DialError::Unreachable(error.to_string()))?;
    let endpoint = endpoint(&found)?
        .connect_timeout(CONNECT_DEADLINE)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(20))
        .keep_alive_while_idle(true)
        .initial_stream_window_size(Some(4 << 20))
        .initial_connection_window_size(Some(16 << 20));
    within(DIAL_DEADLINE, address, connected(endpoint, (address, &found), peer, security)).await
}

/// The endpoint of an address (host:port). The connector does the encryption, so the URL scheme has no effect.
pub(super) fn endpoint(address: &str) -> Result<Endpoint, DialError> {
    Endpoint::from_shared(format!("http://{address}"))
        .ok()
        .filter(|endpoint| endpoint.uri().port().is_some() && endpoint.uri().path() == "/")
        .ok_or_else(|| DialError::Address(address.to_owned()))
}

/// Gives up an attempt to reach `address` after `limit`, because resolvers have no deadline that suits us.
async fn within<T>(
    limit: Duration,
    address: &str,
    attempt: impl Future<Output = Result<T, DialError>>,
) -> Result<T, DialError> {
    let late = |_| DialError::Unreachable(format!("no connection to {address} within {limit:?}"));
    tokio::time::timeout(limit, attempt).await.unwrap_or_else(|elapsed| Err(late(elapsed)))
}

async fn connected(
    endpoint: Endpoint,
    (address, found): (&str, &str),
    peer: PeerRole,
    security: &Security,
) -> Result<Channel, DialError> {
    if matches!(security, Security::Plain)
        && let Ok(mut addresses) = lookup_host(found).await
        && let Some(elsewhere) = addresses.find(|found| !found.ip().is_loopback())
    {
        let address = format!("{found} ({})", elsewhere.ip());
        return Err(PlainText { address }.into());
    }
    let (target, security) = (Arc::<str>::from(address), security.clone());
    // Called for every connection of a channel, so that names and certificates are read again each time.
    let connector = tower::service_fn(move |_| {
        let target = Arc::clone(&target);
        let tls = match &security {
            Security::Plain => None,
            Security::Mutual(tls) => {
                // The certificate proves the peer's role, not its host, so the role's name is verified.
                let name = ServerName::try_from(peer.dns_name()).expect("the names of roles are DNS names");
                Some((tls.client(), name))
            }
        };
        async move {
            let within: Option<Within> = tls
                .is_none()
                .then_some(Within { elsewhere: |address| PlainText { address }.to_string(), check: neighbour::check });
            connect(&launch::find(&target)?, within, tls).await
        }
    });
    endpoint.connect_with_connector(connector).await.map_err(|error| DialError::Unreachable(error_chain(&error)))
}

/// The transport of an HTTP/2 connection.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// Rules for connections that must stay within this machine.
#[derive(Clone, Copy)]
pub(super) struct Within {
    /// Message for an address outside of the loopback interface.
    pub(super) elsewhere: fn(String) -> String,
    /// Refuses a peer process, given the local and the remote address of the connection.
    pub(super) check: fn(SocketAddr, SocketAddr) -> io::Result<()>,
}

/// Connects to the first address of a name that answers, with TLS if there is a configuration. With `within`, only the
/// loopback interface is allowed.
pub(super) async fn connect(
    address: &str,
    within: Option<Within>,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
) -> io::Result<TokioIo<Box<dyn Io>>> {
    let mut problem = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let found: Vec<SocketAddr> = lookup_host(address).await?.collect();
    for candidate in found {
        if let Some(within) = within
            && !candidate.ip().is_loopback()
        {
            problem = io::Error::other((within.elsewhere)(candidate.to_string()));
            continue;
        }
        let stream = match TcpStream::connect(candidate).await {
            Ok(stream) => stream,
            Err(error) => {
                problem = error;
                continue;
            }
        };
        if let Some(within) = within {
            (within.check)(stream.local_addr()?, stream.peer_addr()?)?;
        }
        stream.set_nodelay(true)?;
        return Ok(TokioIo::new(match tls {
            None => Box::new(stream),
            Some((config, name)) => Box::new(TlsConnector::from(config).connect(name, stream).await?),
        }));
    }
    Err(problem)
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_attempt_that_does_not_end_is_abandoned_and_named() {
        let limit = Duration::from_millis(10);
        let late = within(limit, "node-1:7700", std::future::pending::<Result<(), DialError>>()).await;
        let Err(DialError::Unreachable(why)) = late else { panic!("it may be tried again: {late:?}") };
        assert_eq!(why, "no connection to node-1:7700 within 10ms");
        assert!(within(Duration::from_secs(60), "node-1:7700", async { Ok(1) }).await.is_ok_and(|one| one == 1));
    }
}
