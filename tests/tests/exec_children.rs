//! Verifier programs (`kind = "exec"`): their environment, their limits, and that none of their processes survive.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pacs_tests::program;

/// Deadline of every wait in this file.
const DEADLINE: Duration = Duration::from_secs(60);

/// A shell script as verifier, and a file with one answer for it.
struct Trial {
    folder: tempfile::TempDir,
    script: PathBuf,
}

impl Trial {
    /// Makes a script that sends its greeting and runs `judge` for each request; `right` is the reply to send.
    fn new(judge: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("rows.jsonl"), "{\"id\": 1, \"gold\": \"2\", \"pred\": \"2\"}\n")?;
        let script = folder.path().join("verifier.sh");
        let text = format!(
            "right() {{ echo '{{\"id\": 1, \"outcome\": \"correct\"}}'; }}\n\
             note() {{ echo \"$1\" >>'{}'; }}\n\
             echo '{{\"pacs_verifier\": 1, \"version\": \"test\"}}'\n\
             while read -r line; do\n{judge}\ndone\n",
            folder.path().join("notes").display()
        );
        fs::write(&script, text)?;
        Ok(Self { folder, script })
    }

    fn command(&self, options: &[&str]) -> Result<Command> {
        let mut command = Command::new(program("pacs")?);
        command.args(["verify", "exec", "--threads", "1", "--input"]).arg(self.folder.path().join("rows.jsonl"));
        command.args(options).arg("--").arg("bash").arg(&self.script);
        command.env("PACS_TLS_DIR", "/keys").env("SOME_TOKEN", "secret").env("LC_TEST", "told");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }

    /// Grades the answer with `pacs verify exec` and returns its output.
    fn judged(&self, options: &[&str]) -> Result<String> {
        let output = self.command(options)?.output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        Ok(said)
    }

    fn start(&self) -> Result<Child> {
        self.command(&["--timeout", "3000"])?.spawn().context("start pacs")
    }

    fn notes(&self) -> Vec<String> {
        let text = fs::read_to_string(self.folder.path().join("notes")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits for the first `count` notes of the script.
    fn wait_for_notes(&self, count: usize) -> Result<Vec<String>> {
        wait_for("notes", || self.notes().len() >= count)?;
        Ok(self.notes())
    }
}

fn wait_for(what: &str, found: impl Fn() -> bool) -> Result<()> {
    let began = Instant::now();
    while !found() {
        ensure!(began.elapsed() < DEADLINE, "no {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Returns state and parent of a process from `/proc`; `None` when it has ended.
fn process(pid: &str) -> Option<(char, i32)> {
    let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    (state != 'Z').then_some((state, fields.next()?.parse().ok()?))
}

fn wait_for_end(pids: &[String]) -> Result<()> {
    wait_for(&format!("end of {pids:?}"), || pids.iter().all(|pid| process(pid).is_none()))
}

/// Shell text that starts a looping child, one in its own session, and a daemonised one, and notes their ids.
const OFFSPRING: &str = "(while :; do :; done) & note $!
    setsid bash -c 'echo $$; exec sleep 3000' | { read -r pid; note $pid; } &
    bash -c 'setsid sleep 3000 & echo $!' >pid.$$ ; note $(cat pid.$$); rm pid.$$
    note $$";

const OFFSPRING_SIZE: usize = 4;

#[test]
fn they_get_allowed_environment_variables_only() -> Result<()> {
    let names = |options: &[&str]| -> Result<Vec<String>> {
        let trial = Trial::new("note \"$(env)\"; right")?;
        ensure!(trial.judged(options)?.contains("correct"));
        Ok(trial.notes().iter().filter_map(|line| Some(line.split_once('=')?.0.to_owned())).collect())
    };
    let told = names(&[])?;
    assert!(told.iter().any(|name| name == "PATH") && told.iter().any(|name| name == "LC_TEST"), "{told:?}");
    for secret in ["SOME_TOKEN", "PACS_TLS_DIR"] {
        assert!(!told.iter().any(|name| name == secret), "{told:?}");
    }
    assert!(names(&["--pass-env", "SOME_*"])?.iter().any(|name| name == "SOME_TOKEN"));
    Ok(())
}

#[test]
fn they_have_limits_and_cannot_become_anybody_else() -> Result<()> {
    let trial = Trial::new(
        "note $(ulimit -v); note $(ulimit -f); note $(ulimit -c); note $(ulimit -n)
         note $(grep NoNewPrivs /proc/self/status | tr -dc 01); right",
    )?;
    ensure!(trial.judged(&[])?.contains("correct"));
    // Units as `ulimit` prints them: KiB, and blocks of 1 KiB.
    assert_eq!(trial.notes(), [(16 << 20).to_string(), (1 << 20).to_string(), "0".into(), "1024".into(), "1".into()]);
    Ok(())
}

/// Shell text that tries to reach the machine, and answers with what it has reached. `WRITE` and `PORT` stand for a file beside the
/// script and for a port that listens.
const REACHING: &str = r#"reached=""
    cat /etc/passwd >/dev/null 2>&1 && reached="$reached passwords"
    test -e /proc/self && reached="$reached processes"
    (exec 3<>/dev/tcp/127.0.0.1/PORT) 2>/dev/null && reached="$reached network"
    (echo x >'WRITE') 2>/dev/null && reached="$reached disk"
    (echo x >"$TMPDIR/own") 2>/dev/null && test -s "$TMPDIR/own" && reached="$reached scratch"
    test "$(id -u)" = 0 && reached="$reached root"
    echo "{\"id\": 1, \"outcome\": \"correct\", \"rule\": \"reached:$reached.\"}""#;

#[test]
fn in_a_sandbox_they_reach_nothing_but_a_scratch_folder() -> Result<()> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let folder = tempfile::tempdir()?;
    let written = folder.path().join("written");
    let text = REACHING.replace("PORT", &listener.local_addr()?.port().to_string());
    let trial = Trial::new(&text.replace("WRITE", &written.display().to_string()))?;
    let free = trial.judged(&[])?;
    assert!(free.contains("reached: passwords processes network disk"), "{free}");
    fs::remove_file(&written)?;
    let enclosed = trial.judged(&["--sandbox"])?;
    if enclosed.contains("is missing (") {
        eprintln!("SKIPPED: this machine has no whole sandbox: {enclosed}");
        return Ok(());
    }
    assert!(enclosed.contains("reached: scratch."), "{enclosed}");
    assert!(!written.exists());
    Ok(())
}

#[test]
fn what_they_have_started_in_a_sandbox_ends_with_the_verifier() -> Result<()> {
    // They cannot write down who they are: the test looks for what only they execute.
    let seconds = 3000 + std::process::id() % 1000;
    let trial = Trial::new(&format!("setsid sleep {seconds}.25 & sleep {seconds}.25"))?;
    let sleeping = || {
        let command = format!("sleep\0{seconds}.25\0");
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        processes
            .filter(|entry| fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == command.as_bytes()))
            .count()
    };
    let mut verifier = trial.command(&["--timeout", "3000", "--sandbox"])?.spawn().context("start pacs")?;
    let began = Instant::now();
    while sleeping() < 2 {
        if verifier.try_wait()?.is_some() {
            eprintln!("SKIPPED: this machine has no whole sandbox");
            return Ok(());
        }
        ensure!(began.elapsed() < DEADLINE, "they do not start");
        std::thread::sleep(Duration::from_millis(10));
    }
    verifier.kill()?;
    verifier.wait()?;
    wait_for("end of all processes", || sleeping() == 0)
}

#[test]
fn exits_are_described() -> Result<()> {
    for (judge, said) in [
        ("exit 3", "ended with exit code 3"),
        ("kill -SEGV $$", "was killed by signal 11"),
        ("kill -KILL $$", "was killed by signal 9"),
        ("exec 1>&-; sleep 3000", "ended its output"),
    ] {
        let judged = Trial::new(judge)?.judged(&[])?;
        assert!(judged.contains("failed") && judged.contains(said), "{judge}: {judged}");
    }
    Ok(())
}

#[test]
fn what_they_have_started_ends_at_the_time_limit() -> Result<()> {
    let trial = Trial::new(&format!("cd '{}'; {OFFSPRING}; sleep 3000", tempfile::tempdir()?.keep().display()))?;
    let judged = trial.judged(&["--timeout", "5"])?;
    assert!(judged.contains("timed_out"), "{judged}");
    let pids = trial.wait_for_notes(OFFSPRING_SIZE)?;
    wait_for_end(&pids)
}

#[test]
fn what_they_have_started_ends_with_them() -> Result<()> {
    let trial = Trial::new(&format!("cd /tmp; {OFFSPRING}; right; exit 0"))?;
    let judged = trial.judged(&[])?;
    assert!(judged.contains("correct"), "{judged}");
    let pids = trial.wait_for_notes(OFFSPRING_SIZE)?;
    wait_for_end(&pids)
}

#[test]
fn what_they_have_started_ends_when_the_verifier_is_killed() -> Result<()> {
    let trial = Trial::new(&format!("cd /tmp; {OFFSPRING}; wait"))?;
    let mut verifier = trial.start()?;
    let pids = trial.wait_for_notes(OFFSPRING_SIZE)?;
    assert!(pids.iter().all(|pid| process(pid).is_some()), "{pids:?}");
    verifier.kill()?;
    verifier.wait()?;
    wait_for_end(&pids)
}

#[test]
fn they_end_with_their_guard() -> Result<()> {
    let trial = Trial::new("note $$; while :; do :; done")?;
    let mut verifier = trial.start()?;
    let pids = trial.wait_for_notes(1)?;
    let (_, guard) = process(&pids[0]).context("it runs")?;
    assert_ne!(u32::try_from(guard)?, verifier.id(), "there is one in between");
    kill(Pid::from_raw(guard), Signal::SIGKILL)?;
    wait_for_end(&pids)?;
    verifier.kill()?;
    verifier.wait()?;
    Ok(())
}

/// Command prefix that mounts control groups (version 2) at their usual place, for the command alone.
const WITH_GROUPS: [&str; 5] =
    ["unshare", "--mount", "sh", "-c", "mount -t cgroup2 none /sys/fs/cgroup && exec \"$0\" \"$@\""];

/// Returns the prefix with which a command may create control groups; `None` where that is impossible.
fn way_to_groups() -> Option<&'static [&'static str]> {
    let probe = r#"root=$(sed -n 's/^[^ ]* [^ ]* [^ ]* [^ ]* \([^ ]*\) .* - cgroup2 .*/\1/p' /proc/self/mountinfo | tail -n 1)
        group=$root$(sed -n 's/^0:://p' /proc/self/cgroup)/pacs-probe-$$
        test -n "$root" && mkdir "$group" || exit 1
        test -e "$group/cgroup.kill"; can=$?
        rmdir "$group" && exit $can"#;
    let works = |prefix: &[&str]| {
        let line = [prefix, &["sh", "-c", probe]].concat();
        let quiet = Command::new(line[0]).args(&line[1..]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        quiet.is_ok_and(|status| status.success())
    };
    [&[][..], &WITH_GROUPS].into_iter().find(|prefix| works(prefix))
}

/// Returns whether a control group still has a process.
fn is_populated(group: &str) -> bool {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.map(|entry| entry.path().join("cgroup")).any(|file| {
        fs::read_to_string(file).is_ok_and(|groups| groups.lines().any(|line| line.strip_prefix("0::") == Some(group)))
    })
}

#[test]
fn a_fork_bomb_ends_with_its_control_group() -> Result<()> {
    let Some(prefix) = way_to_groups() else {
        eprintln!("SKIPPED: this user may not make control groups (version 2), nor mount them");
        return Ok(());
    };
    // A chain of forks: each process is orphaned before a scan of children can see it.
    let trial = Trial::new(
        "note \"$(sed -n 's/^0:://p' /proc/self/cgroup)\"
         setsid bash -c 'hop() { (hop) & exit 0; }; hop' & sleep 3000",
    )?;
    let plain = trial.command(&["--timeout", "5"])?;
    let line: Vec<_> =
        prefix.iter().map(std::ffi::OsStr::new).chain([plain.get_program()]).chain(plain.get_args()).collect();
    let output = Command::new(line[0]).args(&line[1..]).stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("timed_out"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let notes = trial.wait_for_notes(1)?;
    ensure!(notes[0].contains("/pacs-exec-"), "it ran in the group `{}`", notes[0]);
    wait_for("end of the chain", || !is_populated(&notes[0]))
}

#[test]
fn what_cannot_be_started_says_why() -> Result<()> {
    let trial = Trial::new("right")?;
    let mut command = Command::new(program("pacs")?);
    command.args(["verify", "exec", "--input"]).arg(trial.folder.path().join("rows.jsonl"));
    let output = command.args(["--", "/no/such/program"]).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("failed") && said.contains("No such file"), "{said}");
    Ok(())
}
