//! Simulated hosts on one machine: network namespaces, each with shared memory of its own.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

/// A network namespace whose programs also see a `/dev/shm` of their own.
#[derive(Debug)]
pub struct Host {
    namespace: String,
    /// IP address by which other hosts reach this one.
    pub address: String,
    /// Namespace of the bridge, kept alive by the hosts attached to it; `None` for a lonely host.
    switch: Option<Arc<Host>>,
}

/// Makes hosts that reach each other, each over a link of its own. Returns `None`, reported on standard error, where root, `ip` or
/// `unshare` is missing. Their addresses exist only inside the namespaces.
///
/// # Errors
/// When the first was made and a later step failed.
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

/// Makes a host with only a loopback interface, whose processes reach no other host. Returns `None`, reported on standard error,
/// where that is not possible.
///
/// # Errors
/// When the host was made and its interface cannot be used.
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
    /// Partitions a lonely host: connections stay open, and all packets are lost.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn cut(&self) -> Result<()> {
        self.ip(&["link", "set", "lo", "down"])
    }

    /// Ends the partition of [`Self::cut`].
    ///
    /// # Errors
    /// As [`Self::cut`].
    pub fn mend(&self) -> Result<()> {
        self.ip(&["link", "set", "lo", "up"])
    }

    /// Resets all connections of the host, which both ends notice at once. A kernel without that ability leaves them open.
    ///
    /// # Errors
    /// When `ss` cannot be started.
    pub fn break_connections(&self) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, "ss", "--kill", "--tcp", "state", "established"]);
        command.stdin(Stdio::null()).output().context("start `ss`").map(drop)
    }

    /// Wraps a command to run in this host's network, with the machine's shared memory and files.
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

    /// Makes a command that runs a program on this host. Signals to its process reach the program, because each wrapper replaces
    /// itself by `exec`.
    #[must_use]
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("ip");
        let own_memory = "mount -t tmpfs -o mode=1777 tmpfs /dev/shm && exec \"$@\"";
        command.args(["netns", "exec", &self.namespace, "unshare", "--mount", "--propagation", "private"]);
        command.args(["sh", "-c", own_memory, "sh"]).arg(program);
        command
    }

    /// Limits the send rate of the host's link, in kilobytes per second.
    ///
    /// # Errors
    /// When `tc` is missing, or the kernel lacks the queueing discipline.
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

    /// Returns the bytes received and sent over the link so far.
    ///
    /// # Errors
    /// When the counters cannot be read.
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
        // Running programs keep the namespace alive until they end. The bridge goes with the last host.
        self.switch = None;
        let _ = ip(&["netns", "delete", &self.namespace]);
    }
}

fn ip(arguments: &[&str]) -> Result<Output> {
    let output = Command::new("ip").args(arguments).stdin(Stdio::null()).output().context("start `ip`")?;
    ensure!(output.status.success(), "ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    Ok(output)
}
