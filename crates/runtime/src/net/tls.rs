//! Certificates from files, read again when they change.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::PeerRole;

/// Certificates of the authorities that peers are trusted by. This and the next two are the names of Kubernetes' TLS
/// secrets.
pub const CA_FILE: &str = "ca.crt";
/// This process's certificate, followed by intermediate ones.
pub const CERTIFICATE_FILE: &str = "tls.crt";
/// Its private key.
pub const KEY_FILE: &str = "tls.key";

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("read `{}`: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// A file does not hold what it should.
    #[error("read `{}`: {problem}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong; nothing of its content.
        problem: String,
    },
    /// The private key can be read by others than its owner.
    #[error("private key `{}` can be read by everybody (mode {mode:o}); run `chmod o= {}`", path.display(), path.display())]
    Exposed {
        /// The key.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The certificate is another role's.
    #[error(
        "certificate `{}` is {found}, and a certificate of the {wanted} is needed (DNS name `{}`)",
        path.display(), wanted.dns_name()
    )]
    Role {
        /// The certificate.
        path: PathBuf,
        /// What it is instead.
        found: String,
        /// What it should be.
        wanted: PeerRole,
    },
}

/// The certificates of a process.
pub struct Tls {
    folder: PathBuf,
    role: PeerRole,
    state: Mutex<State>,
}

struct State {
    stamp: Stamp,
    configs: Configs,
    /// Files that could not be used, so that they are complained about once.
    refused: Option<Stamp>,
}

#[derive(Clone)]
struct Configs {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

/// Tells one state of the three files from another.
type Stamp = [(u64, i64, i64, u64); 3];

impl Tls {
    pub(super) fn load(folder: &Path, role: PeerRole) -> Result<Self, TlsError> {
        let stamp = stamp(folder)?;
        let configs = read(folder, role)?;
        Ok(Self { folder: folder.to_owned(), role, state: Mutex::new(State { stamp, configs, refused: None }) })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn client(&self) -> Arc<ClientConfig> {
        self.current().client
    }

    pub(super) fn server(&self) -> Arc<ServerConfig> {
        self.current().server
    }

    /// What the files hold now. While they cannot be used (between two writes, say), what they held before.
    fn current(&self) -> Configs {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(stamp) = stamp(&self.folder) else { return state.configs.clone() };
        if stamp == state.stamp || Some(stamp) == state.refused {
            return state.configs.clone();
        }
        match read(&self.folder, self.role) {
            Ok(configs) => {
                tracing::info!(folder = %self.folder.display(), "certificates were read again");
                *state = State { stamp, configs, refused: None };
            }
            Err(error) => {
                tracing::error!("the changed certificates cannot be used, the old ones stay: failed to {error}");
                state.refused = Some(stamp);
            }
        }
        state.configs.clone()
    }
}

fn stamp(folder: &Path) -> Result<Stamp, TlsError> {
    let mut stamp = Stamp::default();
    for (entry, file) in stamp.iter_mut().zip([CA_FILE, CERTIFICATE_FILE, KEY_FILE]) {
        let path = folder.join(file);
        let metadata = fs::metadata(&path).map_err(|error| TlsError::File { path, error })?;
        *entry = (metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len());
    }
    Ok(stamp)
}

fn read(folder: &Path, role: PeerRole) -> Result<Configs, TlsError> {
    let (ca, certificate, key) = (folder.join(CA_FILE), folder.join(CERTIFICATE_FILE), folder.join(KEY_FILE));
    let mut roots = RootCertStore::empty();
    for authority in certificates(&ca)? {
        roots.add(authority).map_err(|error| content(&ca, &error))?;
    }
    let chain = certificates(&certificate)?;
    let found = role_of(&chain[0]).map_err(|problem| content(&certificate, &problem))?;
    if found != Some(role) {
        let found = found.map_or("of no role".to_owned(), |found| format!("one of the {found}"));
        return Err(TlsError::Role { path: certificate, found, wanted: role });
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = Arc::new(roots);
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
        .build()
        .map_err(|error| content(&ca, &error))?;
    let private = private_key(&key)?;
    let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .and_then(|builder| {
            builder.with_client_cert_verifier(verifier).with_single_cert(chain.clone(), private.clone_key())
        })
        .map_err(|error| content(&certificate, &error))?;
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .and_then(|builder| builder.with_root_certificates(roots).with_client_auth_cert(chain, private))
        .map_err(|error| content(&certificate, &error))?;
    server.alpn_protocols = vec![b"h2".to_vec()];
    client.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Configs { client: Arc::new(client), server: Arc::new(server) })
}

fn content(path: &Path, problem: &dyn std::fmt::Display) -> TlsError {
    TlsError::Content { path: path.to_owned(), problem: problem.to_string() }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let text = fs::read(path).map_err(|error| TlsError::File { path: path.to_owned(), error })?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let certificates = certificates.map_err(|error| content(path, &error))?;
    if certificates.is_empty() {
        return Err(content(path, &"it holds no certificate (PEM)"));
    }
    Ok(certificates)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let file = |error| TlsError::File { path: path.to_owned(), error };
    let mode = fs::metadata(path).map_err(file)?.mode() & 0o777;
    if mode & 0o007 != 0 {
        return Err(TlsError::Exposed { path: path.to_owned(), mode });
    }
    let text = fs::read(path).map_err(file)?;
    // The parser's message may quote the file, and this file is secret.
    PrivateKeyDer::from_pem_slice(&text).map_err(|_| content(path, &"it holds no private key (PEM)"))
}

/// The role that a certificate names; more than one is none.
pub(super) fn role_of(certificate: &CertificateDer<'_>) -> Result<Option<PeerRole>, String> {
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|error| error.to_string())?;
    let mut roles = parsed.valid_dns_names().filter_map(PeerRole::of_dns_name);
    Ok(roles.next().filter(|_| roles.next().is_none()))
}
