//! Command-line options that all worker programs share.

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use super::{Launch, LaunchError};
use crate::net::{CERTIFICATE_FILE, NoRunId, PeerRole, RunIdentity, Security, TlsError};
use crate::{Exit, Health, Link, Policy};

/// How a worker finds its run.
#[derive(Clone, Debug, Args)]
pub struct WorkerArguments {
    /// Coordinator: its address, or the absolute path of its run folder on a shared file system, which says where it
    /// listens. Default: $PACS_COORDINATOR, else the first node of the Slurm job, or the leader that another launcher
    /// names (MASTER_ADDR and the like), at port 7700.
    #[arg(long, value_name = "HOST:PORT|DIR")]
    pub coordinator: Option<String>,
    /// Name of this process slot, the same after a restart; a second process of the same name is refused while the first
    /// lives.
    /// Default: $PACS_WORKER_NAME, else the role and the launcher's index (SLURM_PROCID, JOB_COMPLETION_INDEX, RANK and
    /// the like), else the name of the pod.
    #[arg(long)]
    pub name: Option<String>,
    /// Seconds to look for the coordinator, at the start and again after a registration is lost.
    #[arg(long, value_name = "SECONDS", env = "PACS_JOIN_TIMEOUT", default_value_t = 300, value_parser = clap::value_parser!(u64).range(..=315_360_000))]
    pub join_timeout: u64,
    /// Which start of the job this worker is for: a coordinator of another start refuses it. Launchers set it.
    #[arg(long, value_name = "ID", env = "PACS_ATTEMPT", default_value = "")]
    pub attempt: String,
    /// Identifier of the run that this worker belongs to, as its folder has it: a coordinator of another run is not worked
    /// for. Supervisors and launchers set it; else the worker keeps to the first run that takes it.
    #[arg(long, value_name = "ID", env = "PACS_RUN_ID", default_value = "")]
    pub run_id: String,
    /// When this process was started, microseconds since 1970, by a supervisor that has seen the end of every earlier process
    /// of its name. Supervisors set it; 0: nobody has.
    #[arg(long, value_name = "MICROSECONDS", env = "PACS_STARTED", default_value_t = 0, hide = true)]
    pub started: u64,
    /// Where to answer health probes (grpc.health.v1, in plain text). Default: nowhere.
    #[arg(long, value_name = "HOST:PORT", env = "PACS_HEALTH_LISTEN")]
    pub health_listen: Option<String>,
    /// How connections are protected.
    #[command(flatten)]
    pub security: SecurityArguments,
}

/// How connections are protected.
#[derive(Clone, Debug, Args)]
pub struct SecurityArguments {
    /// Folder with ca.crt, tls.crt and tls.key for this role, itself or in a folder of the role's name below it, as
    /// `pacs certs` writes them, or one file of `pacs certs --join`: all connections are mutual TLS. The files are read
    /// again when they change.
    #[arg(long, value_name = "DIR|FILE", env = "PACS_TLS_DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Speak plain text, with processes of this machine only (loopback addresses).
    #[arg(long, env = "PACS_PLAINTEXT", conflicts_with = "tls_dir")]
    pub plaintext: bool,
}

/// Place of a worker in its run, from options and environment.
#[derive(Clone, Debug)]
pub struct Placement {
    /// How to reach its coordinator.
    pub link: Link,
    /// Name of its process slot.
    pub name: String,
}

/// Why a process cannot be placed in a run.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// An address or a name is missing, malformed or contradictory.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The run identifier is malformed.
    #[error(
        "use the run of this process: {0}; give --run-id ID, or set PACS_RUN_ID, to what `run_id` in the run folder says"
    )]
    Run(#[from] NoRunId),
    /// Neither certificates nor plain text was chosen.
    #[error(
        "no protection of connections is configured: give --tls-dir DIR (`pacs certs` makes the files), or --plaintext \
         for processes of this machine only"
    )]
    Unprotected,
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The health port cannot be listened on.
    #[error("listen on {address} for health probes: {error}")]
    Health {
        /// The address as given.
        address: String,
        /// Error of the system.
        error: std::io::Error,
    },
    /// There is no route to the coordinator.
    #[error("find this machine's address towards {coordinator} within {} s: {error}; give --bind ADDRESS", waited.as_secs())]
    NoRoute {
        /// Address of the coordinator.
        coordinator: String,
        /// Time since the first try.
        waited: Duration,
        /// Error of the last try.
        error: std::io::Error,
    },
}

impl PlaceError {
    /// Exit code for this error.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Launch(_) | Self::Run(_) | Self::Unprotected => Exit::Usage,
            Self::Tls(TlsError::File { error, .. }) => Exit::of_file(error),
            Self::Tls(_) => Exit::Config,
            Self::Health { .. } | Self::NoRoute { .. } => Exit::Again,
        }
    }
}

impl WorkerArguments {
    /// Determines this worker's place, logs the source of each value, and starts to answer health probes.
    ///
    /// # Errors
    /// When an address, a name or the run's identifier is missing or malformed, two launchers disagree, the certificates cannot be used,
    /// or the health port is taken.
    pub async fn place(&self, role: PeerRole) -> Result<Placement, PlaceError> {
        let launch = Launch::of_process();
        let coordinator = launch.coordinator(self.coordinator.as_deref())?.logged("the coordinator").value;
        let name = launch.name(self.name.as_deref(), role.name())?.logged("the name of this process").value;
        let run_id = RunIdentity::told(&self.run_id)?;
        let security = self.security.security(role)?;
        let health = Health::default();
        // An empty variable counts as not set.
        if let Some(address) = self.health_listen.as_ref().filter(|address| !address.is_empty()) {
            health.serve(address).await.map_err(|error| PlaceError::Health { address: address.clone(), error })?;
        }
        let join_timeout = Duration::from_secs(self.join_timeout);
        let attempt = self.attempt.clone();
        let started = self.started;
        Ok(Placement { link: Link { coordinator, attempt, run_id, started, join_timeout, security, health }, name })
    }

    /// The address at which others reach this process: from `flag` or the environment, otherwise the source address of
    /// packets to the coordinator.
    ///
    /// # Errors
    /// When there is no route to the coordinator within the join timeout.
    pub async fn own_address(&self, flag: Option<&str>, coordinator: &str) -> Result<String, PlaceError> {
        if let Some(said) = Launch::of_process().own_address(flag) {
            return Ok(said.logged("the address of this process").value);
        }
        let look = Policy::new("look for the coordinator", LOOKUP_DEADLINE);
        let mut tries = look.patience(Duration::from_secs(self.join_timeout)).tries();
        loop {
            let error = match within(LOOKUP_DEADLINE, address_towards(coordinator)).await {
                Ok(address) => {
                    tracing::info!("the address of this process is {address} (from the route to the coordinator)");
                    return Ok(address);
                }
                Err(error) => error,
            };
            if !tries.again("look for the way to the coordinator", &error).await {
                let coordinator = coordinator.to_owned();
                return Err(PlaceError::NoRoute { coordinator, waited: tries.waited(), error });
            }
        }
    }
}

impl SecurityArguments {
    /// The protection that these options select.
    ///
    /// # Errors
    /// [`PlaceError::Unprotected`] without either option, [`PlaceError::Tls`] for certificates that cannot be used.
    pub fn security(&self, role: PeerRole) -> Result<Security, PlaceError> {
        match (&self.tls_dir, self.plaintext) {
            (Some(folder), _) => Ok(security(folder, role)?),
            (None, true) => Ok(Security::Plain),
            (None, false) => Err(PlaceError::Unprotected),
        }
    }
}

/// Mutual TLS with the certificate of `role` in `folder`, or in the subfolder with the role's name.
///
/// # Errors
/// As [`Security::mutual`].
pub fn security(folder: &Path, role: PeerRole) -> Result<Security, TlsError> {
    let below = folder.join(role.name());
    let folder = if below.join(CERTIFICATE_FILE).exists() { &below } else { folder };
    Security::mutual(folder, role)
}

/// Deadline of one name lookup, because resolvers have none that suits us.
const LOOKUP_DEADLINE: Duration = Duration::from_secs(15);

async fn within<T>(limit: Duration, found: impl Future<Output = std::io::Result<T>>) -> std::io::Result<T> {
    let late = || std::io::Error::new(std::io::ErrorKind::TimedOut, format!("no address within {limit:?}"));
    tokio::time::timeout(limit, found).await.unwrap_or_else(|_| Err(late()))
}

/// Source address of packets to `coordinator`, found without sending any.
async fn address_towards(coordinator: &str) -> std::io::Result<String> {
    let target = super::find(coordinator)?;
    let not_found = || std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
    let target: SocketAddr = tokio::net::lookup_host(target).await?.next().ok_or_else(not_found)?;
    let any: SocketAddr = if target.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    Ok(match socket.local_addr()?.ip() {
        std::net::IpAddr::V4(address) => address.to_string(),
        std::net::IpAddr::V6(address) => format!("[{address}]"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_look_up_that_does_not_end_is_abandoned() {
        let never = within(Duration::from_millis(10), std::future::pending::<std::io::Result<()>>()).await;
        assert_eq!(never.expect_err("it never ends").to_string(), "no address within 10ms");
    }

    #[tokio::test]
    async fn packets_to_this_machine_leave_from_it() {
        assert_eq!(address_towards("127.0.0.1:7700").await.expect("a route"), "127.0.0.1");
        assert!(address_towards("no.such.host.invalid:7700").await.is_err());
    }

    #[test]
    fn protection_must_be_said() {
        let arguments = |plaintext| SecurityArguments { tls_dir: None, plaintext };
        assert!(matches!(arguments(true).security(PeerRole::Learner), Ok(Security::Plain)));
        let error = arguments(false).security(PeerRole::Learner).expect_err("not said");
        assert_eq!(error.exit(), Exit::Usage);
    }
}
