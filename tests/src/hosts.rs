//! "Hosts" of one machine: each has a network and shared memory of its own.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

/// A network namespace, in which programs see a `/dev/shm` of their own too.
#[derive(Debug)]
pub struct Host {
    namespace: String,
    /// Its address for the others.
    pub address: String,
    /// Lives as long as a host that is plugged into it.
    switch: Option<Arc<Host>>,
}

/// Hosts that reach each other, each by a link of its own; `None`, said aloud, where they cannot be made: it takes root, `ip` and
/// `unshare`. Their addresses exist within them alone.
///
/// # Errors
/// When one was made and the rest was not.
pub fn hosts(count: u8) -> Result<Option<Vec<Host>>> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let host = |side: u8| Host {
        namespace: format!("pacs-{}-{number}-{side}", std::process::id()),
        address: format!("10.213.77.{side}"),
        switch: None,
    };
    let switch = Arc::new(host(0));
    if let Err(error) = switch.make() {
        eprintln!("SKIPPED: no hosts of their own network can be made here: {error:#}");
        return Ok(None);
    }
    switch.ip(&["link", "add", "switch", "type", "bridge", "stp_state", "0", "forward_delay", "0"])?;
    switch.ip(&["link", "set", "switch", "up"])?;
    let mut hosts = Vec::new();
    for side in 1..=count {
        let mut host = host(side);
        host.switch = Some(Arc::clone(&switch));
        host.make()?;
        let port = format!("port{side}");
        switch.ip(&["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &host.namespace])?;
        switch.ip(&["link", "set", &port, "master", "switch", "up"])?;
        host.ip(&["address", "add", &format!("{}/24", host.address), "dev", "eth0"])?;
        host.ip(&["link", "set", "lo", "up"])?;
        host.ip(&["link", "set", "eth0", "up"])?;
        hosts.push(host);
    }
    Ok(Some(hosts))
}

/// A host with nothing but a loopback interface, for processes that reach each other and nobody else; `None`, said aloud, where it
/// cannot be made.
///
/// # Errors
/// When it was made and its interface cannot be used.
pub fn lonely_host() -> Result<Option<Host>> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let namespace = format!("pacs-{}-lonely-{number}", std::process::id());
    let host = Host { namespace, address: "127.0.0.1".to_owned(), switch: None };
    if let Err(error) = host.make() {
        eprintln!("SKIPPED: no host of its own network can be made here, so nothing is cut: {error:#}");
        return Ok(None);
    }
    host.mend()?;
    Ok(Some(host))
}

impl Host {
    /// Cuts all connections of a lonely host, which do not notice: what is sent is lost.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn cut(&self) -> Result<()> {
        self.ip(&["link", "set", "lo", "down"])
    }

    /// Ends a cut.
    ///
    /// # Errors
    /// As [`Self::cut`].
    pub fn mend(&self) -> Result<()> {
        self.ip(&["link", "set", "lo", "up"])
    }

    /// Breaks all its connections, which notice at once. A kernel that cannot do that leaves them as they are.
    ///
    /// # Errors
    /// When `ss` cannot be started.
    pub fn break_connections(&self) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, "ss", "--kill", "--tcp", "state", "established"]);
        command.stdin(Stdio::null()).output().context("start `ss`").map(drop)
    }

    /// The same command on this host, which keeps the memory and the files of the machine.
    #[must_use]
    pub fn within(&self, command: &Command) -> Command {
        let mut within = Command::new("ip");
        within.args(["netns", "exec", &self.namespace]).arg(command.get_program()).args(command.get_args());
        within
    }

    fn make(&self) -> Result<()> {
        ip(&["netns", "add", &self.namespace])?;
        let tried = self.command(Path::new("true")).stdin(Stdio::null()).output().context("start a program there")?;
        ensure!(tried.status.success(), "{}", String::from_utf8_lossy(&tried.stderr));
        Ok(())
    }

    fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", &self.namespace], arguments].concat()).map(drop)
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

    /// Bounds what the host sends over its link, in kilobytes a second.
    ///
    /// # Errors
    /// When `tc` is not there, or the kernel has no such queue.
    pub fn slow_down(&self, rate: u32) -> Result<()> {
        let mut command = Command::new("ip");
        let (rate, queue) = (format!("{}kbit", 8 * rate), ["burst", "32k", "latency", "400ms"]);
        command.args([
            "netns",
            "exec",
            &self.namespace,
            "tc",
            "qdisc",
            "add",
            "dev",
            "eth0",
            "root",
            "tbf",
            "rate",
            &rate,
        ]);
        let output = command.args(queue).stdin(Stdio::null()).output().context("start `tc`")?;
        ensure!(output.status.success(), "tc qdisc add: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
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
        // What runs there keeps it alive until it has ended. The switch goes when the last host has.
        self.switch = None;
        let _ = ip(&["netns", "delete", &self.namespace]);
    }
}

fn ip(arguments: &[&str]) -> Result<Output> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output().context("start `ip`")?;
    ensure!(output.status.success(), "ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    Ok(output)
}
