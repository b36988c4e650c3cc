//! Certificates that a run makes for itself when it is given none, in its folder and for its own processes.
//!
//! While the run is live the folder holds a certificate and key per role, readable by the owner only. The authority's key is never
//! written ([`certs::issue`]), so a reader of the folder can impersonate a role of this run until the certificates expire, but can
//! sign no others. Workers read the folder for every connection. So after a kill the next `pacs run` reuses the certificates or
//! makes new ones, and surviving workers switch to them.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use pacs_runtime::net::PeerRole;
use tokio::time::interval;

use crate::certs::{self, DAY};

/// Subfolder of the run folder that holds the certificates.
const FOLDER: &str = "certificates";

/// File with the inode number of the folder for which the certificates were made, which tells a copied run folder from the
/// original. The copy makes its own, so that the original's certificates are not valid for it.
const PLACE: &str = "place";

/// Validity of a certificate; short, so that a leaked folder becomes useless.
const LIFE: Duration = DAY.saturating_mul(30);

/// Remaining validity at which certificates are renewed; long enough for a machine that was asleep over a holiday.
const RENEW: Duration = DAY.saturating_mul(10);

/// Interval of the renewal check.
const LOOK_AGAIN: Duration = Duration::from_secs(3600);

/// The self-made certificates of a run.
#[derive(Clone, Debug)]
pub(super) struct Certificates {
    folder: PathBuf,
    life: Duration,
}

impl Certificates {
    /// Loads the certificates of the run in `run_dir`, or makes them when there are no usable ones.
    ///
    /// # Errors
    /// When they cannot be written, or the folder is a link or belongs to another user.
    pub(super) fn of_run(run_dir: &Path) -> Result<Self> {
        Self::good_for(run_dir, LIFE)
    }

    fn good_for(run_dir: &Path, life: Duration) -> Result<Self> {
        let certificates = Self { folder: run_dir.canonicalize()?.join(FOLDER), life };
        certificates.make().with_context(|| format!("make certificates in `{}`", certificates.folder.display()))?;
        Ok(certificates)
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    fn make(&self) -> Result<()> {
        certs::create_folder(&self.folder)?;
        let metadata = fs::symlink_metadata(&self.folder)?;
        ensure!(metadata.is_dir(), "it is no folder");
        ensure!(metadata.uid() == fs::metadata("/proc/self")?.uid(), "it is another user's");
        // Locked: two processes that start at once would mix certificates of two authorities.
        let folder = File::open(&self.folder)?;
        let _lock = Flock::lock(folder, FlockArg::LockExclusive).map_err(|(_, error)| io::Error::from(error))?;
        let place = metadata.ino().to_string();
        let is_exposed = metadata.permissions().mode() & 0o077 != 0;
        let was_made_here = fs::read_to_string(self.folder.join(PLACE)).is_ok_and(|made| made == place);
        // Others may have read exposed keys, so narrower permissions alone would not help: make new ones.
        if is_exposed || !was_made_here {
            fs::set_permissions(&self.folder, Permissions::from_mode(0o700))?;
            self.empty()?;
            fs::write(self.folder.join(PLACE), place)?;
        }
        self.renew()
    }

    /// Makes new certificates unless the present ones are valid for longer than [`RENEW`].
    fn renew(&self) -> Result<()> {
        match certs::is_complete(&self.folder, RENEW.min(self.life / 3)) {
            true => Ok(()),
            false => certs::issue(&self.folder, self.life),
        }
    }

    /// Renews the certificates in time; runs until dropped.
    pub(super) async fn keep_fresh(self) {
        let mut look = interval(LOOK_AGAIN);
        loop {
            look.tick().await;
            if let Err(error) = self.renew() {
                tracing::error!(folder = %self.folder.display(), "the certificates of the run were not renewed: {error:#}");
            }
        }
    }

    /// Removes the certificates at the end of a run, when none of its processes is left.
    pub(super) fn remove(&self) {
        let removed = self.empty().and_then(|()| Ok(fs::remove_dir(&self.folder)?));
        if let Err(error) = removed {
            tracing::warn!(folder = %self.folder.display(), "certificates of the run were left: {error:#}");
        }
    }

    fn empty(&self) -> Result<()> {
        let gone = |removed: io::Result<()>| match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        };
        for role in PeerRole::ALL {
            gone(fs::remove_dir_all(self.folder.join(role.name())))?;
        }
        Ok(gone(fs::remove_file(self.folder.join(PLACE)))?)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use pacs_protocol::v1::GetStatusRequest;
    use pacs_protocol::v1::operator_service_client::OperatorServiceClient;
    use pacs_runtime::launch::security;
    use pacs_runtime::net::{RunIdentity, Security, accept, dial, server};
    use tokio::net::TcpListener;
    use tonic::Code;
    use tonic::service::Routes;

    use super::*;

    fn read(run: &Path, file: &str) -> String {
        fs::read_to_string(run.join(FOLDER).join(file)).expect("written")
    }

    /// Returns whether a server with the certificates `served` admits a client with those of `client`. The server has no services.
    async fn is_let_in(client: &Security, served: &Security) -> bool {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let router = server().add_routes(Routes::default());
        let serving = tokio::spawn(router.serve_with_incoming(accept(listener, served.clone())));
        // The client's handshake completes before the server refuses its certificate, so only a call shows the refusal.
        let answered = async {
            let channel = dial(&address, PeerRole::Coordinator, client, &RunIdentity::default()).await.ok()?;
            OperatorServiceClient::new(channel).get_status(GetStatusRequest {}).await.err()
        };
        let is_let_in = answered.await.is_some_and(|status| status.code() == Code::Unimplemented);
        serving.abort();
        is_let_in
    }

    #[test]
    fn they_are_made_once_and_hold_nothing_that_signs() {
        let run = tempfile::tempdir().expect("a temporary folder");
        let made = Certificates::of_run(run.path()).expect("made");
        let first = read(run.path(), "learner/tls.crt");
        Certificates::of_run(run.path()).expect("there");
        assert_eq!(read(run.path(), "learner/tls.crt"), first, "survivors of a killed run use them");
        for role in PeerRole::ALL {
            assert!(security(made.folder(), role).is_ok(), "{role}");
        }
        let mut files = Vec::new();
        for entry in fs::read_dir(made.folder()).expect("listed").flatten() {
            if entry.path().is_dir() {
                files.extend(fs::read_dir(entry.path()).expect("listed").flatten().map(|file| file.file_name()));
            }
        }
        files.sort();
        files.dedup();
        assert_eq!(files, ["ca.crt", "tls.crt", "tls.key"]);
        let mode = |file: &str| fs::metadata(made.folder().join(file)).expect("there").mode() & 0o777;
        assert_eq!((mode(""), mode("learner"), mode("learner/tls.key")), (0o700, 0o700, 0o600));
        made.remove();
        assert_eq!(fs::read_dir(run.path()).expect("listed").count(), 0, "nothing stays of a run that has ended");
    }

    #[test]
    fn a_copy_of_the_folder_gets_its_own() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let [original, copy, moved] = ["original", "copy", "moved"].map(|name| dir.path().join(name));
        fs::create_dir(&original).expect("made");
        Certificates::of_run(&original).expect("made");
        let copied = std::process::Command::new("cp").arg("-a").arg(&original).arg(&copy).status().expect("cp");
        assert!(copied.success());
        Certificates::of_run(&copy).expect("made");
        let authority = read(&original, "learner/ca.crt");
        assert!(!read(&copy, "learner/ca.crt").contains(authority.trim()), "the original's open nothing there");
        fs::rename(&original, &moved).expect("moved");
        Certificates::of_run(&moved).expect("there");
        assert_eq!(read(&moved, "learner/ca.crt"), authority, "the run that was moved keeps its own");
    }

    #[test]
    fn a_folder_too_open_for_keys_is_refused_or_restricted() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        symlink(dir.path(), dir.path().join(FOLDER)).expect("linked");
        let error = Certificates::of_run(dir.path()).expect_err("a link");
        assert!(format!("{error:#}").contains("it is no folder"), "{error:#}");
        fs::remove_file(dir.path().join(FOLDER)).expect("removed");

        Certificates::of_run(dir.path()).expect("made");
        let before = read(dir.path(), "learner/tls.key");
        fs::set_permissions(dir.path().join(FOLDER), Permissions::from_mode(0o755)).expect("opened");
        Certificates::of_run(dir.path()).expect("made");
        assert_ne!(read(dir.path(), "learner/tls.key"), before, "others may have read it");
        assert_eq!(fs::metadata(dir.path().join(FOLDER)).expect("there").mode() & 0o777, 0o700);
    }

    /// A worker that read its certificate before a renewal and a coordinator that reads afterwards accept each other, and the other
    /// way round. A certificate of another run is accepted by neither.
    #[tokio::test]
    async fn processes_progress_while_they_are_renewed() {
        let (run, other) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        let made = Certificates::good_for(run.path(), DAY).expect("made");
        let of = |role| security(made.folder(), role).expect("good");
        let (coordinator, learner) = (of(PeerRole::Coordinator), of(PeerRole::Learner));
        assert!(is_let_in(&learner, &coordinator).await);
        let before = read(run.path(), "learner/tls.crt");
        made.renew().expect("nothing to do");
        assert_eq!(read(run.path(), "learner/tls.crt"), before);

        // One day of validity is less than `RENEW`, so the certificates are made again.
        Certificates::of_run(run.path()).expect("renewed");
        assert_ne!(read(run.path(), "learner/tls.crt"), before);
        let (new_coordinator, new_learner) = (of(PeerRole::Coordinator), of(PeerRole::Learner));
        for client in [&learner, &new_learner] {
            for served in [&coordinator, &new_coordinator] {
                assert!(is_let_in(client, served).await);
            }
        }
        assert!(learner.valid_for() > Some(10 * DAY), "it was read again");

        let strange = Certificates::of_run(other.path()).expect("made");
        let stranger = security(strange.folder(), PeerRole::Learner).expect("good");
        assert!(!is_let_in(&stranger, &new_coordinator).await);
        let strange = security(strange.folder(), PeerRole::Coordinator).expect("good");
        assert!(!is_let_in(&new_learner, &strange).await, "nothing is asked of a coordinator that it does not know");
    }
}
