//! Determines a process's place in a cluster: its name, the coordinator's address, its own address.
//!
//! Command-line options take precedence over `PACS_*` variables, and those over the launcher's variables (Slurm,
//! Kubernetes, `torch` style). The role is never guessed. The deciding source is logged; launchers that contradict each
//! other are refused, because there is no way to tell which of them started this process.

mod arguments;
mod hostlist;
mod rendezvous;

use std::fmt;

pub use self::arguments::{PlaceError, Placement, SecurityArguments, WorkerArguments, security};
pub use self::hostlist::hosts;
pub use self::rendezvous::{RECORD_FILE, find, run_id};

/// Default port of a coordinator whose host alone is known.
pub const DEFAULT_PORT: u16 = 7700;

/// Reads a process's place from environment variables.
pub struct Launch<'a> {
    variable: Box<Lookup<'a>>,
}

/// Looks up an environment variable.
type Lookup<'a> = dyn Fn(&str) -> Option<String> + Send + 'a;

impl fmt::Debug for Launch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launch").finish_non_exhaustive()
    }
}

/// A value and the source that decided it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed<T> {
    /// The decided value.
    pub value: T,
    /// Name of the option or variable that it comes from.
    pub source: String,
}

impl<T: fmt::Display> Placed<T> {
    /// Logs the value and its source.
    #[must_use]
    pub fn logged(self, what: &str) -> Self {
        tracing::info!("{what} is {} (from {})", self.value, self.source);
        self
    }
}

/// Why a process's place cannot be determined.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// No source provides the value.
    #[error("the {what} is not known: give {option}, or set {variable}")]
    Unknown {
        /// The missing value.
        what: &'static str,
        /// Option that sets it.
        option: &'static str,
        /// Variable that sets it.
        variable: &'static str,
    },
    /// Two launchers provide different values.
    #[error("{first} and {second} contradict each other about the {what}: say with {option} which is right")]
    Contradiction {
        /// The value in question.
        what: &'static str,
        /// The first variable, with its value.
        first: String,
        /// The second variable, with its value.
        second: String,
        /// Option that decides.
        option: &'static str,
    },
    /// A variable has an invalid value.
    #[error("variable {name} is `{value}`; expected {expected}")]
    Malformed {
        /// Name of the variable.
        name: &'static str,
        /// Value that was found.
        value: String,
        /// Form of a valid value.
        expected: &'static str,
    },
}

/// Variables with the index of this process among those of its role, by launcher.
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
    /// Reads the environment of this process.
    #[must_use]
    pub fn of_process() -> Self {
        Self::new(|name| std::env::var(name).ok())
    }
}

impl<'a> Launch<'a> {
    /// Reads from `variable`; empty values count as not set.
    pub fn new(variable: impl Fn(&str) -> Option<String> + Send + 'a) -> Self {
        Self { variable: Box::new(move |name| variable(name).filter(|value| !value.is_empty())) }
    }

    /// Address of the coordinator: host:port, or the path of its run folder.
    ///
    /// # Errors
    /// When no option or launcher names it, launchers name different ones, or a variable is malformed.
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
        // The port variables of these launchers belong to their own servers, so only the host is used.
        match agreed(hosts, "coordinator's host", "--coordinator")? {
            Some(Placed { value, source }) => Ok(Placed { value: with_port(&value), source }),
            None => Err(LaunchError::Unknown {
                what: "coordinator's address",
                option: "--coordinator HOST:PORT",
                variable: "PACS_COORDINATOR",
            }),
        }
    }

    /// Name of this process slot, stable across restarts: `<role>-<index>`, or the name of the pod.
    ///
    /// # Errors
    /// As [`Self::coordinator`].
    pub fn name(&self, flag: Option<&str>, role: &str) -> Result<Placed<String>, LaunchError> {
        if let Some(said) = self.said("--name", flag, "PACS_WORKER_NAME") {
            return Ok(said);
        }
        let mut indices = Vec::new();
        for name in INDEX {
            let Some(value) = self.get(name) else { continue };
            let expected = "a number, counted from 0";
            let index: u32 = value.parse().map_err(|_| LaunchError::Malformed { name, value, expected })?;
            // The rank of a process takes precedence over that of its node.
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

    /// Address of this machine for other processes, without a port; `None` if no source provides it.
    #[must_use]
    pub fn own_address(&self, flag: Option<&str>) -> Option<Placed<String>> {
        let node = || self.get("SLURMD_NODENAME").map(|value| Placed { value, source: "SLURMD_NODENAME".to_owned() });
        self.said("--bind", flag, "PACS_BIND").or_else(node)
    }

    /// Address for a coordinator to listen on, host:port; the loopback interface if no source provides it.
    #[must_use]
    pub fn listen(&self, flag: Option<&str>) -> Placed<String> {
        let node = || {
            let node = self.get("SLURMD_NODENAME")?;
            Some(Placed { value: with_port(&node), source: "SLURMD_NODENAME".to_owned() })
        };
        let default = || Placed { value: format!("127.0.0.1:{DEFAULT_PORT}"), source: "the default".to_owned() };
        self.said("--listen", flag, "PACS_LISTEN").or_else(node).unwrap_or_else(default)
    }

    /// The value of the option or of our own variable.
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

/// The value that all candidates agree on, if there are any.
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
    // An IPv6 address needs brackets before a port.
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
