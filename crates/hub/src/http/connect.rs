use std::io;
use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hyper::Uri;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{HubError, Settings};

/// Longest head of a proxy's answer.
const MOST_PROXY_HEAD: usize = 8 << 10;

/// A connection, with TLS or without.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// TLS that trusts the authorities of the Mozilla list, which come with the program (a slim image has none), and those of a file.
pub(crate) fn tls(authorities: Option<&Path>) -> Result<ClientConfig, HubError> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(path) = authorities {
        let unusable =
            |message: String| HubError::Setting { what: format!("SSL_CERT_FILE `{}`", path.display()), message };
        let certificates = CertificateDer::pem_file_iter(path).map_err(|error| unusable(error.to_string()))?;
        for certificate in certificates {
            let certificate = certificate.map_err(|error| unusable(error.to_string()))?;
            // Bundles of systems hold some that are of no use, and the others have to be used all the same.
            let _ = roots.add(certificate);
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| HubError::Setting { what: "TLS".to_owned(), message: error.to_string() })?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

/// Whether a host is this machine, by its address.
pub(crate) fn is_loopback(host: &str) -> bool {
    let host = host.trim_matches(['[', ']']);
    host == "localhost" || host.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback())
}

/// Connects to the host of an address.
pub(crate) async fn connect(
    settings: &Settings,
    tls: &Arc<ClientConfig>,
    target: &Uri,
) -> io::Result<TokioIo<Box<dyn Stream>>> {
    let host = target.host().unwrap_or_default().trim_matches(['[', ']']);
    let secured = target.scheme_str() == Some("https");
    let port = target.port_u16().unwrap_or(if secured { 443 } else { 80 });
    let proxy = settings.proxy.as_deref().filter(|_| secured && !is_exempt(&settings.no_proxy, host));
    let tcp = match proxy {
        Some(proxy) => tunnel(proxy, host, port).await?,
        None => TcpStream::connect((host, port)).await?,
    };
    tcp.set_nodelay(true)?;
    if !secured {
        return Ok(TokioIo::new(Box::new(tcp)));
    }
    let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
    let stream = TlsConnector::from(Arc::clone(tls)).connect(name, tcp).await?;
    Ok(TokioIo::new(Box::new(stream)))
}

/// Has a proxy connect to the host.
async fn tunnel(proxy: &str, host: &str, port: u16) -> io::Result<TcpStream> {
    let refused = |message: String| io::Error::other(format!("by the proxy of HTTPS_PROXY: {message}"));
    let whole = if proxy.contains("://") { proxy.to_owned() } else { format!("http://{proxy}") };
    let address: Uri = whole.parse().map_err(|_| refused("it is no address".to_owned()))?;
    if address.scheme_str() != Some("http") {
        return Err(refused("expected http://[USER:PASSWORD@]HOST:PORT".to_owned()));
    }
    let authority = address.authority().ok_or_else(|| refused("it names no host".to_owned()))?;
    let (user, _) = authority.as_str().rsplit_once('@').unwrap_or(("", ""));
    let proxy_host = authority.host().trim_matches(['[', ']']);
    let mut stream = TcpStream::connect((proxy_host, authority.port_u16().unwrap_or(80)))
        .await
        .map_err(|error| refused(error.to_string()))?;
    let target = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    let mut request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n");
    if !user.is_empty() {
        request.push_str(&format!("Proxy-Authorization: Basic {}\r\n", STANDARD.encode(unescaped(user))));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() > MOST_PROXY_HEAD {
            return Err(refused("its answer does not end".to_owned()));
        }
        // Byte by byte: what follows the head is of the server.
        head.push(stream.read_u8().await.map_err(|error| refused(error.to_string()))?);
    }
    let line = String::from_utf8_lossy(&head);
    let status = line.split(' ').nth(1).unwrap_or_default();
    if status != "200" {
        return Err(refused(format!("it answers with status {}", status.chars().take(8).collect::<String>())));
    }
    Ok(stream)
}

/// Undoes the escapes of a user and password in an address.
fn unescaped(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut place = 0;
    while place < bytes.len() {
        let code = text.get(place + 1..place + 3).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match code.filter(|_| bytes[place] == b'%') {
            Some(code) => {
                plain.push(code);
                place += 3;
            }
            None => {
                plain.push(bytes[place]);
                place += 1;
            }
        }
    }
    plain
}

/// Whether a host is reached without the proxy: itself, or the end of its name after a dot, is listed.
fn is_exempt(listed: &[String], host: &str) -> bool {
    is_loopback(host)
        || listed.iter().any(|entry| {
            let name = entry.trim_start_matches('.');
            entry == "*" || host == name || host.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_without_a_proxy() {
        let listed: Vec<String> = ["hub.example", ".corp", "10.0.0.1"].map(str::to_owned).into();
        for (host, exempt) in [
            ("hub.example", true),
            ("cdn.hub.example", true),
            ("evilhub.example", false),
            ("a.corp", true),
            ("10.0.0.1", true),
            ("huggingface.co", false),
            ("127.0.0.1", true),
        ] {
            assert_eq!(is_exempt(&listed, host), exempt, "{host}");
        }
        assert!(is_exempt(&["*".to_owned()], "huggingface.co"));
    }

    #[test]
    fn users_of_proxies_are_unescaped() {
        assert_eq!(unescaped("me%40x:p%25w%"), b"me@x:p%w%");
    }
}
