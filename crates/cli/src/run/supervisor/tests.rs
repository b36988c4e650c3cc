use tokio::time::timeout;

use super::*;

/// Makes a worker command that runs this shell script.
fn script(name: &str, script: &str) -> WorkerCommand {
    WorkerCommand {
        name: name.into(),
        program: "/bin/sh".into(),
        arguments: vec!["-c".into(), script.into()],
        run_id: "0123".into(),
        gpu: None,
        environment: Vec::new(),
        gate: None,
        living: None,
    }
}

const DEADLINE: Duration = Duration::from_secs(20);

async fn next(supervisor: &mut Supervisor) -> WorkerNews {
    timeout(DEADLINE, supervisor.news()).await.expect("news before the deadline")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

#[test]
fn a_dead_worker_is_restarted() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let marker = dir.path().join("second");
    let second =
        format!("if [ -e {m} ]; then echo again; exec sleep 60; fi; touch {m}; kill -9 $$", m = marker.display());
    runtime().block_on(async {
        let mut supervisor = Supervisor::start(vec![script("w", &second)], dir.path());
        match next(&mut supervisor).await {
            WorkerNews::Restarting { name, how, .. } => assert!(name == "w" && how.contains("signal 9"), "{how}"),
            other => panic!("{other:?}"),
        }
        let log = dir.path().join("w.log");
        let again = async {
            while !fs::read_to_string(&log).is_ok_and(|text| text.contains("again")) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(DEADLINE, again).await.expect("the second process writes");
        let ending = Instant::now();
        supervisor.finish(Duration::from_millis(50), &Shutdown::new()).await;
        assert!(ending.elapsed() < TERM_GRACE, "SIGTERM ends it");
    });
}

#[test]
fn a_wrong_configuration_is_given_up_with_the_last_lines() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    fs::write(dir.path().join("w.log"), "from an earlier run\n").expect("written");
    runtime().block_on(async {
        let commands = vec![script("w", "echo starting; echo 'error: failed to read the model' >&2; exit 78")];
        let mut supervisor = Supervisor::start(commands, dir.path());
        let WorkerNews::GivenUp(given_up) = next(&mut supervisor).await else { panic!("must be given up") };
        assert_eq!(given_up.exit, Exit::Config);
        assert_eq!(given_up.how, "ended with exit code 78");
        assert_eq!(given_up.tail, ["starting", "error: failed to read the model"]);
        supervisor.finish(DEADLINE, &Shutdown::new()).await;
    });
}

#[test]
fn a_missing_program_is_given_up() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    runtime().block_on(async {
        let command = WorkerCommand { program: "/no/such/program".into(), ..script("w", "") };
        let mut supervisor = Supervisor::start(vec![command], dir.path());
        let WorkerNews::GivenUp(given_up) = next(&mut supervisor).await else { panic!("must be given up") };
        assert!(given_up.how.contains("/no/such/program"), "{}", given_up.how);
        supervisor.finish(DEADLINE, &Shutdown::new()).await;
    });
}

#[test]
fn workers_that_ignore_sigterm_are_killed() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let ready = dir.path().join("ready");
    let stubborn = format!("trap '' TERM; touch {}; while :; do sleep 0.1; done", ready.display());
    runtime().block_on(async {
        let supervisor = Supervisor::start(vec![script("w", &stubborn)], dir.path());
        let started = async {
            while !ready.exists() {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(DEADLINE, started).await.expect("it starts");
        timeout(DEADLINE, supervisor.finish(Duration::ZERO, &Shutdown::new())).await.expect("it is killed");
    });
}

#[test]
fn dismissed_workers_are_not_restarted() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    runtime().block_on(async {
        let supervisor = Supervisor::start(vec![script("w", "echo once")], dir.path());
        sleep(Duration::from_millis(200)).await;
        timeout(DEADLINE, supervisor.finish(DEADLINE, &Shutdown::new())).await.expect("nothing is left to wait for");
        assert_eq!(fs::read_to_string(dir.path().join("w.log")).expect("the log"), "once\n");
    });
}

#[test]
fn a_hurry_cuts_the_wait_short() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    runtime().block_on(async {
        let supervisor = Supervisor::start(vec![script("w", "exec sleep 60")], dir.path());
        let shutdown = Shutdown::new();
        shutdown.request();
        shutdown.request();
        timeout(DEADLINE, supervisor.finish(Duration::from_secs(60), &shutdown)).await.expect("it is ended at once");
    });
}

#[test]
fn workers_hear_of_their_run_and_of_the_order_of_their_starts() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let say = "echo \"$PACS_RUN_ID $PACS_STARTED\"; exit 70";
    runtime().block_on(async {
        let mut supervisor = Supervisor::start(vec![script("w", say)], dir.path());
        for _ in 0..2 {
            assert!(matches!(next(&mut supervisor).await, WorkerNews::Restarting { .. }));
        }
        supervisor.finish(Duration::ZERO, &Shutdown::new()).await;
    });
    let said = fs::read_to_string(dir.path().join("w.log")).expect("the log");
    let starts: Vec<u64> =
        said.lines().map(|line| line.strip_prefix("0123 ").expect(line).parse().expect(line)).collect();
    assert!(starts.len() >= 2 && starts.is_sorted_by(|a, b| a < b), "{said}");
}

#[test]
fn a_server_that_does_not_answer_in_time_is_killed_with_what_it_has_started() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let port = crate::servers::free_ports(1, &[]).expect("a free port")[0];
    // The process that is left in the group would hold the GPU.
    let engine = dir.path().join("engine");
    let silent = format!("trap '' TERM; sleep 600 & echo $! >{}; wait", engine.display());
    let gate = Some(crate::servers::Gate { port, limit: Duration::from_millis(1500) });
    runtime().block_on(async {
        let command = WorkerCommand { gate, environment: vec![("A".into(), "b".into())], ..script("vllm-0", &silent) };
        let mut supervisor = Supervisor::start(vec![command], dir.path());
        let WorkerNews::Restarting { name, how, .. } = next(&mut supervisor).await else { panic!("must be restarted") };
        assert_eq!((name.as_str(), how.as_str()), ("vllm-0", "did not answer /health within 1.5 s"));
        let engine: u32 = fs::read_to_string(&engine).expect("written").trim().parse().expect("a process id");
        let gone = async {
            while crate::process::began(engine).is_some() {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(DEADLINE, gone).await.expect("what it has started is killed, too");
        supervisor.finish(Duration::ZERO, &Shutdown::new()).await;
    });
}

#[test]
fn a_server_that_answers_stays_and_ends_with_the_run() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let limit = Duration::from_secs(10);
    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    runtime().block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let answering = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.expect("a connection");
                let mut head = [0; 1024];
                let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut head).await;
                let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, answer.as_bytes()).await;
            }
        });
        let gate = crate::servers::Gate { port, limit };
        timeout(DEADLINE, gate.passed()).await.expect("it answers");
        assert!(timeout(Duration::from_millis(300), gate.missed()).await.is_err());
        // No worker dismisses a server: it is asked to end when the run is over.
        let command = WorkerCommand { gate: Some(gate), ..script("vllm-0", "exec sleep 600") };
        let supervisor = Supervisor::start(vec![command], dir.path());
        sleep(Duration::from_millis(200)).await;
        let ending = Instant::now();
        supervisor.finish(Duration::from_secs(60), &Shutdown::new()).await;
        assert!(ending.elapsed() < Duration::from_secs(30), "it was waited for");
        answering.abort();
    });
}
