//! Connections that go out.

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

/// How long one attempt to connect may take.
pub(super) const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// How long all of it may take, names looked up and connections made.
const DIAL_DEADLINE: Duration = Duration::from_secs(15);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The address cannot be used.
    #[error("address `{0}` is not host:port")]
    Address(String),
    /// It would be in plain text.
    #[error(transparent)]
    PlainText(#[from] PlainText),
    /// Nobody answers, or not as it should; it may be tried again.
    #[error("{0}")]
    Unreachable(String),
}

/// Connects once to the process of role `peer` at `address` (host:port), for calls that belong to `run`. While it is not
/// known it is not named, which registration takes.
///
/// # Errors
/// See [`DialError`].
pub async fn dial(
    address: &str,
    peer: PeerRole,
    security: &Security,
    run: &RunIdentity,
) -> Result<RunChannel, DialError> {
    Ok(of_run(dial_any(address, peer, security).await?, run.clone()))
}

/// The same for calls that belong to no run, as operators make them. `address` may be the folder of a run, too (see
/// [`launch::find`]): it is read for every connection, so that a channel follows a coordinator that starts again elsewhere.
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

/// The endpoint of an address (host:port). Who encrypts is the connector, so its scheme means nothing.
pub(super) fn endpoint(address: &str) -> Result<Endpoint, DialError> {
    Endpoint::from_shared(format!("http://{address}"))
        .ok()
        .filter(|endpoint| endpoint.uri().port().is_some() && endpoint.uri().path() == "/")
        .ok_or_else(|| DialError::Address(address.to_owned()))
}

/// Gives an attempt to reach `address` up after `limit`: resolvers keep no deadline of ours.
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
    // Called for every connection of a channel, so that names and certificates are looked at anew.
    let connector = tower::service_fn(move |_| {
        let target = Arc::clone(&target);
        let tls = match &security {
            Security::Plain => None,
            Security::Mutual(tls) => {
                // What the peer is matters, not where: its certificate holds its role.
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

/// What HTTP/2 runs on.
pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// What holds for connections that must stay within this machine.
#[derive(Clone, Copy)]
pub(super) struct Within {
    /// Says why an address beyond the loopback interface is not connected to.
    pub(super) elsewhere: fn(String) -> String,
    /// Refuses a process, by this process's address of the connection and its own.
    pub(super) check: fn(SocketAddr, SocketAddr) -> io::Result<()>,
}

/// Connects to the first address of a name that answers, by TLS where there is a configuration for it; with `within` only
/// on the loopback interface.
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
    async fn an_attempt_that_does_not_end_is_given_up_and_named() {
        let limit = Duration::from_millis(10);
        let late = within(limit, "node-1:7700", std::future::pending::<Result<(), DialError>>()).await;
        let Err(DialError::Unreachable(why)) = late else { panic!("it may be tried again: {late:?}") };
        assert_eq!(why, "no connection to node-1:7700 within 10ms");
        assert!(within(Duration::from_secs(60), "node-1:7700", async { Ok(1) }).await.is_ok_and(|one| one == 1));
    }
}
