//! Certificates from files, which are read again when they change.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::PeerRole;

/// File with the certificates of trusted authorities. The three names are those of Kubernetes' TLS secrets.
pub const CA_FILE: &str = "ca.crt";
/// File with this process's certificate, followed by intermediate ones.
pub const CERTIFICATE_FILE: &str = "tls.crt";
/// File with the private key of that certificate.
pub const KEY_FILE: &str = "tls.key";

/// Twenty years, in seconds.
const FAR: u64 = 20 * 365 * 24 * 3600;

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("read `{}`: {error}", path.display())]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        error: io::Error,
    },
    /// A file has invalid content.
    #[error("read `{}`: {problem}", path.display())]
    Content {
        /// Path of the file.
        path: PathBuf,
        /// Description of the problem, without any content of the file.
        problem: String,
    },
    /// Others than the owner can read the private key.
    #[error("private key `{}` is world-readable (mode {mode:o}); run `chmod o= {}`", path.display(), path.display())]
    Exposed {
        /// Path of the key.
        path: PathBuf,
        /// File mode of the key.
        mode: u32,
    },
    /// Every peer would refuse the certificate: it has expired, or the authorities did not sign it.
    #[error("certificate `{}` cannot be used: {problem}; `pacs certs` makes new ones", path.display())]
    Refused {
        /// Path of the certificate.
        path: PathBuf,
        /// The error that a peer would report.
        problem: rustls::Error,
    },
    /// The certificate belongs to another role.
    #[error(
        "certificate `{}` is {found}, and a certificate of the {wanted} is needed (DNS name `{}`)",
        path.display(), wanted.dns_name()
    )]
    Role {
        /// Path of the certificate.
        path: PathBuf,
        /// Description of the role that it has.
        found: String,
        /// Role that is needed.
        wanted: PeerRole,
    },
}

/// The certificates of a process.
pub struct Tls {
    /// A folder with three files, or a single file with all of them.
    folder: PathBuf,
    role: PeerRole,
    state: Mutex<LoadedFiles>,
}

struct LoadedFiles {
    stamp: Stamp,
    configs: Configs,
    /// Last version of the files that could not be used, so that each is logged once.
    refused: Option<Stamp>,
}

#[derive(Clone)]
struct Configs {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    expires: UnixTime,
}

/// Identity of one version of the three files, from their metadata.
type Stamp = [(u64, i64, i64, u64); 3];

impl Tls {
    pub(super) fn load(folder: &Path, role: PeerRole) -> Result<Self, TlsError> {
        let stamp = stamp(folder)?;
        let configs = read(folder, role)?;
        Ok(Self { folder: folder.to_owned(), role, state: Mutex::new(LoadedFiles { stamp, configs, refused: None }) })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Time until the certificate expires.
    pub(super) fn valid_for(&self) -> Duration {
        let now = UnixTime::now().as_secs();
        Duration::from_secs(self.current().expires.as_secs().saturating_sub(now))
    }

    pub(super) fn client(&self) -> Arc<ClientConfig> {
        self.current().client
    }

    pub(super) fn server(&self) -> Arc<ServerConfig> {
        self.current().server
    }

    /// The current configurations. While the files are unusable, between two writes for example, those loaded before.
    fn current(&self) -> Configs {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Ok(stamp) = stamp(&self.folder) else { return state.configs.clone() };
        if stamp == state.stamp || Some(stamp) == state.refused {
            return state.configs.clone();
        }
        match read(&self.folder, self.role) {
            Ok(configs) => {
                tracing::info!(folder = %self.folder.display(), "certificates were read again");
                *state = LoadedFiles { stamp, configs, refused: None };
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
    let Files { ca, certificate, key } = Files::of(folder);
    for (entry, path) in stamp.iter_mut().zip([ca, certificate, key]) {
        let metadata = fs::metadata(&path).map_err(|error| TlsError::File { path, error })?;
        *entry = (metadata.ino(), metadata.mtime(), metadata.mtime_nsec(), metadata.len());
    }
    Ok(stamp)
}

/// Paths of the authorities, the certificate and the key.
struct Files {
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl Files {
    fn of(folder: &Path) -> Self {
        match folder.is_file() {
            true => Self { ca: folder.to_owned(), certificate: folder.to_owned(), key: folder.to_owned() },
            false => Self {
                ca: folder.join(CA_FILE),
                certificate: folder.join(CERTIFICATE_FILE),
                key: folder.join(KEY_FILE),
            },
        }
    }
}

fn read(folder: &Path, role: PeerRole) -> Result<Configs, TlsError> {
    let Files { ca, certificate, key } = Files::of(folder);
    let mut chain = certificates(&certificate)?;
    // In a single file, the authority's certificate comes last.
    let authorities = match ca == certificate {
        true => chain.split_off(chain.len() - 1),
        false => certificates(&ca)?,
    };
    if chain.is_empty() {
        return Err(content(
            &certificate,
            &"it holds one certificate, and the process's own and the authority's are needed",
        ));
    }
    let roots = root_store(&ca, authorities)?;
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
    let expires = expiry(&chain, verifier.as_ref())
        .map_err(|problem| TlsError::Refused { path: certificate.clone(), problem })?;
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
    Ok(Configs { client: Arc::new(client), server: Arc::new(server), expires })
}

/// The first second at which peers refuse a chain that they accept now. It is found by running their verification, so
/// that it reflects whichever certificate of the chain expires first. A chain that is valid for longer than `FAR`
/// counts as `FAR`.
fn expiry(chain: &[CertificateDer<'_>], verifier: &dyn ClientCertVerifier) -> Result<UnixTime, rustls::Error> {
    let accepts = |seconds| {
        let time = UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        verifier.verify_client_cert(&chain[0], &chain[1..], time).map(|_| ())
    };
    let now = UnixTime::now().as_secs();
    accepts(now)?;
    let (mut good, mut bad) = (now, now + FAR);
    while bad - good > 1 {
        let middle = u64::midpoint(good, bad);
        match accepts(middle) {
            Ok(()) => good = middle,
            Err(_) => bad = middle,
        }
    }
    Ok(UnixTime::since_unix_epoch(Duration::from_secs(bad)))
}

/// Configuration of a client that trusts the authorities in a PEM file, and has no certificate itself.
pub(super) fn of_authorities(path: &Path) -> Result<Arc<ClientConfig>, TlsError> {
    let roots = root_store(path, certificates(path)?)?;
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| content(path, &error))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

fn root_store(path: &Path, authorities: Vec<CertificateDer<'static>>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority).map_err(|error| content(path, &error))?;
    }
    Ok(roots)
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
    // Without the parser's message, because it may quote the file, which is secret.
    PrivateKeyDer::from_pem_slice(&text).map_err(|_| content(path, &"it holds no private key (PEM)"))
}

/// Checks that a certificate is one of `role`.
///
/// # Errors
/// A description of what it is instead.
pub fn check_role(certificate: &CertificateDer<'_>, role: PeerRole) -> Result<(), String> {
    match role_of(certificate)? {
        Some(found) if found == role => Ok(()),
        Some(found) => Err(format!("its certificate is one of the {found}")),
        None => Err("its certificate is of no role".to_owned()),
    }
}

/// The role that a certificate names; `None` if there is none or more than one.
pub(super) fn role_of(certificate: &CertificateDer<'_>) -> Result<Option<PeerRole>, String> {
    let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|error| error.to_string())?;
    let mut roles = parsed.valid_dns_names().filter_map(PeerRole::of_dns_name);
    Ok(roles.next().filter(|_| roles.next().is_none()))
}
