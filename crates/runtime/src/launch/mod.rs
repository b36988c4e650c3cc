//! Where a process stands in a cluster: its name, the coordinator's address, its own address.
//!
//! What the command line says goes before the `PACS_*` variables, and those before the variables of the launcher (Slurm,
//! Kubernetes, `torch` style). The role is never guessed. Which source decided is logged; launchers that contradict each
//! other are refused, for there is no telling which of them started this process.

mod arguments;
mod hostlist;
mod rendezvous;

use std::fmt;

pub use self::arguments::{PlaceError, Placement, SecurityArguments, WorkerArguments, security};
pub use self::hostlist::hosts;
pub use self::rendezvous::{RECORD_FILE, find, run_id};

/// The port that a coordinator listens on when only its host is known.
pub const DEFAULT_PORT: u16 = 7700;

/// Looks up environment variables.
pub struct Launch<'a> {
    variable: Box<Lookup<'a>>,
}

/// Looks an environment variable up.
type Lookup<'a> = dyn Fn(&str) -> Option<String> + Send + 'a;

impl fmt::Debug for Launch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launch").finish_non_exhaustive()
    }
}

/// A value, and who decided it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed<T> {
    /// The value.
    pub value: T,
    /// The option, or the variable, that it is from.
    pub source: String,
}

impl<T: fmt::Display> Placed<T> {
    /// Logs what was decided, and who decided it.
    #[must_use]
    pub fn logged(self, what: &str) -> Self {
        tracing::info!("{what} is {} (from {})", self.value, self.source);
        self
    }
}

/// Why the place of a process is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// Nothing says it.
    #[error("the {what} is not known: give {option}, or set {variable}")]
    Unknown {
        /// What is missing.
        what: &'static str,
        /// The option that says it.
        option: &'static str,
        /// The variable that says it.
        variable: &'static str,
    },
    /// Two launchers say different things.
    #[error("{first} and {second} contradict each other about the {what}: say with {option} which is right")]
    Contradiction {
        /// What they disagree about.
        what: &'static str,
        /// A variable and its value.
        first: String,
        /// Another one.
        second: String,
        /// The option that decides.
        option: &'static str,
    },
    /// A variable does not hold what it should.
    #[error("variable {name} is `{value}`; expected {expected}")]
    Malformed {
        /// The variable.
        name: &'static str,
        /// Its value.
        value: String,
        /// What belongs there.
        expected: &'static str,
    },
}

/// Position of this process among those of its role, by launcher.
const INDEX: [&str; 8] = [
    "SLURM_PROCID",
    "JOB_COMPLETION_INDEX",
    "LWS_WORKER_INDEX",
    "VC_TASK_INDEX",
    "VK_TASK_INDEX",
    "RANK",
    "PET_NODE_RANK",
    "NODE_RANK",
];

impl Launch<'static> {
    /// The environment of this process.
    #[must_use]
    pub fn of_process() -> Self {
        Self::new(|name| std::env::var(name).ok())
    }
}

impl<'a> Launch<'a> {
    /// An environment in which `variable` looks names up; empty values count as not set.
    pub fn new(variable: impl Fn(&str) -> Option<String> + Send + 'a) -> Self {
        Self { variable: Box::new(move |name| variable(name).filter(|value| !value.is_empty())) }
    }

    /// The coordinator's address, host:port or the path of its run folder.
    ///
    /// # Errors
    /// See [`LaunchError`].
    pub fn coordinator(&self, flag: Option<&str>) -> Result<Placed<String>, LaunchError> {
        if let Some(said) = self.said("--coordinator", flag, "PACS_COORDINATOR") {
            return Ok(said);
        }
        let mut hosts = Vec::new();
        for name in ["SLURM_JOB_NODELIST_HET_GROUP_0", "SLURM_JOB_NODELIST", "SLURM_NODELIST"] {
            if let Some(list) = self.get(name) {
                let expected = "a list of hosts such as n[1-3]";
                let all = hostlist::hosts(&list).ok_or(LaunchError::Malformed { name, value: list, expected })?;
                hosts.push((name, all[0].clone()));
                break;
            }
        }
        if let Some(list) = self.get("VC_COORDINATOR_HOSTS") {
            hosts.push(("VC_COORDINATOR_HOSTS", list.split(',').next().unwrap_or_default().to_owned()));
        }
        for name in ["LWS_LEADER_ADDRESS", "MASTER_ADDR", "PET_MASTER_ADDR"] {
            hosts.extend(self.get(name).map(|host| (name, host)));
        }
        // The ports of these launchers belong to servers of their own.
        match agreed(hosts, "coordinator's host", "--coordinator")? {
            Some(Placed { value, source }) => Ok(Placed { value: with_port(&value), source }),
            None => Err(LaunchError::Unknown {
                what: "coordinator's address",
                option: "--coordinator HOST:PORT",
                variable: "PACS_COORDINATOR",
            }),
        }
    }

    /// Name of this process slot, the same after a restart: `<role>-<index>`, or the name of the pod.
    ///
    /// # Errors
    /// See [`LaunchError`].
    pub fn name(&self, flag: Option<&str>, role: &str) -> Result<Placed<String>, LaunchError> {
        if let Some(said) = self.said("--name", flag, "PACS_WORKER_NAME") {
            return Ok(said);
        }
        let mut indices = Vec::new();
        for name in INDEX {
            let Some(value) = self.get(name) else { continue };
            let expected = "a number, counted from 0";
            let index: u32 = value.parse().map_err(|_| LaunchError::Malformed { name, value, expected })?;
            // The rank of a process says more than that of its node.
            if !(name.ends_with("NODE_RANK") && indices.iter().any(|(known, _)| *known == "RANK")) {
                indices.push((name, index.to_string()));
            }
        }
        if let Some(Placed { value, source }) = agreed(indices, "index of this process", "--name")? {
            return Ok(Placed { value: format!("{role}-{value}"), source });
        }
        match (self.get("KUBERNETES_SERVICE_HOST"), self.get("HOSTNAME")) {
            (Some(_), Some(pod)) => Ok(Placed { value: pod, source: "HOSTNAME, the pod's name".to_owned() }),
            _ => Err(LaunchError::Unknown {
                what: "name of this process",
                option: "--name NAME",
                variable: "PACS_WORKER_NAME",
            }),
        }
    }

    /// The address of this machine that other processes dial, without a port; `None` when nothing says it.
    #[must_use]
    pub fn own_address(&self, flag: Option<&str>) -> Option<Placed<String>> {
        let node = || self.get("SLURMD_NODENAME").map(|value| Placed { value, source: "SLURMD_NODENAME".to_owned() });
        self.said("--bind", flag, "PACS_BIND").or_else(node)
    }

    /// Where a coordinator listens, host:port; the loopback interface when nothing says it.
    #[must_use]
    pub fn listen(&self, flag: Option<&str>) -> Placed<String> {
        let node = || {
            let node = self.get("SLURMD_NODENAME")?;
            Some(Placed { value: with_port(&node), source: "SLURMD_NODENAME".to_owned() })
        };
        let default = || Placed { value: format!("127.0.0.1:{DEFAULT_PORT}"), source: "the default".to_owned() };
        self.said("--listen", flag, "PACS_LISTEN").or_else(node).unwrap_or_else(default)
    }

    /// What the command line or our own variable says.
    fn said(&self, option: &str, flag: Option<&str>, variable: &str) -> Option<Placed<String>> {
        match (flag, self.get(variable)) {
            (Some(flag), Some(other)) if flag != other => {
                let source = format!("{option}, which overrides {variable}={other}");
                Some(Placed { value: flag.to_owned(), source })
            }
            (Some(flag), _) => Some(Placed { value: flag.to_owned(), source: option.to_owned() }),
            (None, value) => value.map(|value| Placed { value, source: variable.to_owned() }),
        }
    }

    fn get(&self, name: &str) -> Option<String> {
        (self.variable)(name)
    }
}

/// The one value of all candidates, if there is any.
fn agreed(
    candidates: Vec<(&'static str, String)>,
    what: &'static str,
    option: &'static str,
) -> Result<Option<Placed<String>>, LaunchError> {
    let Some((name, value)) = candidates.first() else { return Ok(None) };
    if let Some((other, different)) = candidates.iter().find(|(_, other)| other != value) {
        let (first, second) = (format!("{name}={value}"), format!("{other}={different}"));
        return Err(LaunchError::Contradiction { what, first, second, option });
    }
    let names: Vec<&str> = candidates.iter().map(|(name, _)| *name).collect();
    Ok(Some(Placed { value: value.clone(), source: names.join(" and ") }))
}

fn with_port(host: &str) -> String {
    // An IPv6 address stands in brackets when a port follows.
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{DEFAULT_PORT}")
    } else {
        format!("{host}:{DEFAULT_PORT}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment<'a>(variables: &'a [(&'a str, &'a str)]) -> Launch<'a> {
        Launch::new(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn the_coordinator_is_found() {
        let slurm = ("SLURM_JOB_NODELIST", "n[3-5]");
        let het = ("SLURM_JOB_NODELIST_HET_GROUP_0", "head");
        let ours = ("PACS_COORDINATOR", "a:1");
        let torch = ("MASTER_ADDR", "n3");
        let cases: [(&[_], Option<&str>, &str, &str); 8] = [
            (&[ours, slurm], Some("b:2"), "b:2", "--coordinator, which overrides PACS_COORDINATOR=a:1"),
            (&[ours], Some("a:1"), "a:1", "--coordinator"),
            (&[ours, slurm], None, "a:1", "PACS_COORDINATOR"),
            (&[slurm], None, "n3:7700", "SLURM_JOB_NODELIST"),
            (&[slurm, het], None, "head:7700", "SLURM_JOB_NODELIST_HET_GROUP_0"),
            (&[slurm, torch], None, "n3:7700", "SLURM_JOB_NODELIST and MASTER_ADDR"),
            (&[("PET_MASTER_ADDR", "fd00::1")], None, "[fd00::1]:7700", "PET_MASTER_ADDR"),
            (&[("VC_COORDINATOR_HOSTS", "c-0.job,c-1.job")], None, "c-0.job:7700", "VC_COORDINATOR_HOSTS"),
        ];
        for (variables, flag, address, source) in cases {
            let found = environment(variables).coordinator(flag).expect(address);
            assert_eq!((found.value.as_str(), found.source.as_str()), (address, source));
        }
    }

    #[test]
    fn what_is_not_known_or_contradicts_itself_is_refused() {
        let error = |variables: &[(&str, &str)]| environment(variables).coordinator(None).expect_err("no address");
        assert_eq!(
            error(&[]).to_string(),
            "the coordinator's address is not known: give --coordinator HOST:PORT, or set PACS_COORDINATOR"
        );
        assert_eq!(
            error(&[("SLURM_JOB_NODELIST", "n[1-2]"), ("MASTER_ADDR", "other")]).to_string(),
            "SLURM_JOB_NODELIST=n1 and MASTER_ADDR=other contradict each other about the coordinator's host: say with \
             --coordinator which is right"
        );
        assert_eq!(
            error(&[("SLURM_JOB_NODELIST", "n[1-")]).to_string(),
            "variable SLURM_JOB_NODELIST is `n[1-`; expected a list of hosts such as n[1-3]"
        );
        let name = |variables: &[(&str, &str)]| environment(variables).name(None, "learner").map(|name| name.value);
        assert!(matches!(name(&[]), Err(LaunchError::Unknown { .. })));
        assert!(matches!(name(&[("SLURM_PROCID", "3"), ("RANK", "2")]), Err(LaunchError::Contradiction { .. })));
        assert!(matches!(name(&[("RANK", "two")]), Err(LaunchError::Malformed { name: "RANK", .. })));
    }

    #[test]
    fn names_are_stable_and_of_their_role() {
        let kubernetes = ("KUBERNETES_SERVICE_HOST", "10.0.0.1");
        let cases: [(&[_], &str); 8] = [
            (&[("SLURM_PROCID", "3")], "learner-3"),
            (&[("SLURM_PROCID", "3"), ("RANK", "3"), ("NODE_RANK", "0")], "learner-3"),
            (&[("JOB_COMPLETION_INDEX", "1"), kubernetes, ("HOSTNAME", "x-1")], "learner-1"),
            (&[("LWS_WORKER_INDEX", "2")], "learner-2"),
            (&[("PET_NODE_RANK", "4")], "learner-4"),
            (&[kubernetes, ("HOSTNAME", "demo-rollout-7f9")], "demo-rollout-7f9"),
            (&[("SLURM_PROCID", "3"), ("PACS_WORKER_NAME", "mine")], "mine"),
            (&[("PACS_WORKER_NAME", ""), ("VC_TASK_INDEX", "5")], "learner-5"),
        ];
        for (variables, expected) in cases {
            assert_eq!(environment(variables).name(None, "learner").expect(expected).value, expected);
        }
        assert_eq!(environment(&[("RANK", "1")]).name(Some("given"), "learner").expect("given").source, "--name");
    }

    #[test]
    fn addresses_of_this_machine_come_from_the_node() {
        let slurm = [("SLURMD_NODENAME", "n2")];
        assert_eq!(environment(&slurm).own_address(None).expect("known").value, "n2");
        assert_eq!(environment(&slurm).own_address(Some("10.0.0.2")).expect("known").value, "10.0.0.2");
        assert_eq!(environment(&[]).own_address(None), None);
        assert_eq!(environment(&slurm).listen(None).value, "n2:7700");
        assert_eq!(environment(&[]).listen(None).value, "127.0.0.1:7700");
        assert_eq!(environment(&[("PACS_LISTEN", "0.0.0.0:1")]).listen(None).value, "0.0.0.0:1");
    }
}
