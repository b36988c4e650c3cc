//! "Hosts" of one machine: each has a network and shared memory of its own.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

/// A network namespace, in which programs see a `/dev/shm` of their own too.
#[derive(Debug)]
pub struct Host {
    namespace: String,
    /// Its address on the link to the other one.
    pub address: String,
}

/// Two hosts with a link between them; `None`, said aloud, where they cannot be made: it takes root, `ip` and `unshare`. The
/// addresses exist within the two namespaces alone.
///
/// # Errors
/// When one was made and the rest was not.
pub fn hosts() -> Result<Option<[Host; 2]>> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let host = |side: u8| Host {
        namespace: format!("pacs-{}-{number}-{side}", std::process::id()),
        address: format!("10.213.77.{side}"),
    };
    let hosts = [host(1), host(2)];
    if let Err(error) = hosts[0].make() {
        eprintln!("SKIPPED: no hosts of their own network can be made here: {error:#}");
        return Ok(None);
    }
    hosts[1].make()?;
    let [first, second] = hosts.each_ref().map(|host| host.namespace.as_str());
    ip(&["-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second])?;
    for host in &hosts {
        let address = format!("{}/24", host.address);
        ip(&["-n", &host.namespace, "address", "add", &address, "dev", "eth0"])?;
        for link in ["lo", "eth0"] {
            ip(&["-n", &host.namespace, "link", "set", link, "up"])?;
        }
    }
    Ok(Some(hosts))
}

impl Host {
    fn make(&self) -> Result<()> {
        ip(&["netns", "add", &self.namespace])?;
        let tried = self.command(Path::new("true")).stdin(Stdio::null()).output().context("start a program there")?;
        ensure!(tried.status.success(), "{}", String::from_utf8_lossy(&tried.stderr));
        Ok(())
    }

    /// A command that runs a program there. What is sent to its process is sent to the program: every step takes the place of the
    /// one before.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("ip");
        let own_memory = "mount -t tmpfs -o mode=1777 tmpfs /dev/shm && exec \"$@\"";
        command.args(["netns", "exec", &self.namespace, "unshare", "--mount", "--propagation", "private"]);
        command.args(["sh", "-c", own_memory, "sh"]).arg(program);
        command
    }

    /// Bytes that have come over the link so far, and that have gone.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn link_bytes(&self) -> Result<(u64, u64)> {
        let read = |name: &str| -> Result<u64> {
            let path = format!("/sys/class/net/eth0/statistics/{name}");
            let output = ip(&["netns", "exec", &self.namespace, "cat", &path])?;
            String::from_utf8(output.stdout)?.trim().parse().context("a number of bytes")
        };
        Ok((read("rx_bytes")?, read("tx_bytes")?))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // What runs there keeps it alive until it has ended.
        let _ = ip(&["netns", "delete", &self.namespace]);
    }
}

fn ip(arguments: &[&str]) -> Result<Output> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output().context("start `ip`")?;
    ensure!(output.status.success(), "ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    Ok(output)
}
