//! The dashboard of a coordinator over HTTP: who gets in, what every answer carries, and how large answers become.

use std::io::Write as _;
use std::net::SocketAddr;

use crate::support::{Job, PATIENCE};
use pacs_coordinator::DashboardRecord;
use pacs_dashboard::Server;
use pacs_protocol::v1;
use pacs_protocol::v1::worker_service_server::WorkerService as _;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// An answer: its status line and headers in lower case, and its body.
struct Answer {
    head: String,
    body: String,
}

impl Answer {
    fn status(&self) -> u16 {
        self.head.split(' ').nth(1).unwrap().parse().unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {} {}", self.head, self.body))
    }
}

/// Sends a request with these header lines. `host:` is that of this machine unless they name one.
async fn ask(address: SocketAddr, method: &str, path: &str, headers: &[&str], body: &str) -> Answer {
    let mut request = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    if !headers.iter().any(|header| header.starts_with("host:")) {
        request += "host: localhost\r\n";
    }
    headers.iter().for_each(|header| request += &format!("{header}\r\n"));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{request}\r\n{body}").as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    Answer { head: head.to_ascii_lowercase(), body: body.to_owned() }
}

async fn get(address: SocketAddr, path: &str, headers: &[&str]) -> Answer {
    ask(address, "GET", path, headers, "").await
}

async fn within(work: impl Future<Output = ()>) {
    tokio::time::timeout(PATIENCE, work).await.unwrap();
}

fn token(server: &Server) -> String {
    server.link().split_once("#token=").unwrap().1.to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_is_for_holders_of_a_token_only_and_every_answer_is_sealed() {
    let job = Job::new();
    let coordinator = job.start(5, "").await.unwrap();
    assert!(DashboardRecord::read(&job.run_dir()).is_none(), "nothing listens unless it is asked for");
    let everywhere = "0.0.0.0:0".parse().unwrap();
    let refused = coordinator.observer().serve_dashboard(everywhere, &job.spec(5, "")).await.unwrap_err();
    assert!(refused.to_string().contains("reachable from other machines"), "{refused}");

    let local = "127.0.0.1:0".parse().unwrap();
    let server = coordinator.observer().serve_dashboard(local, &job.spec(5, "")).await.unwrap();
    let (address, token) = (server.address(), token(&server));
    let (record, key) = DashboardRecord::read(&job.run_dir()).unwrap();
    assert_eq!(record.address, address);

    // Files are public, and say what the page may do.
    let page = get(address, "/", &[]).await;
    assert!(page.status() == 200 && page.body.contains("<main"), "{}", page.head);
    // Calls are not.
    let paths = ["status", "metrics", "samples", "sample?group=0", "events", "lanes", "settings"];
    for path in paths {
        let answer = get(address, &format!("/api/0/{path}"), &[]).await;
        assert_eq!(answer.status(), 401, "{path}");
        assert!(answer.body.contains("pacs dashboard"), "it says what to do: {}", answer.body);
    }
    let expired = key.token(std::time::Duration::ZERO);
    for wrong in ["", "nonsense", &token[1..], &expired] {
        let bearer = format!("authorization: Bearer {wrong}");
        assert_eq!(get(address, "/api/0/status", &[&bearer]).await.status(), 401, "{wrong}");
        assert_eq!(ask(address, "POST", "/api/login", &[], wrong).await.status(), 401, "{wrong}");
    }

    let bearer = format!("authorization: Bearer {token}");
    let status = get(address, "/api/0/status", &[&bearer]).await;
    assert_eq!(status.json()["status"]["total_steps"], 5);
    let fresh = format!("authorization: Bearer {}", key.token(std::time::Duration::from_secs(60)));
    assert_eq!(get(address, "/api/runs", &[&fresh]).await.json()["runs"][0]["name"], "test");

    // A browser changes the token into a cookie that its scripts cannot read.
    let login = ask(address, "POST", "/api/login", &[], &token).await;
    assert_eq!(login.status(), 204);
    let cookie = login.head.lines().find_map(|line| line.strip_prefix("set-cookie: ")).unwrap();
    assert!(
        cookie.contains("httponly") && cookie.contains("samesite=strict") && cookie.contains("max-age="),
        "{cookie}"
    );
    let cookie = format!("cookie: other=1; {}", cookie.split(';').next().unwrap());
    assert_eq!(get(address, "/api/0/status", &[&cookie]).await.status(), 200);

    // Neither a name that was made to resolve to this machine, nor a page of another origin, gets anything.
    for path in ["/", "/api/0/status"] {
        assert_eq!(get(address, path, &["host: evil.example", &bearer]).await.status(), 421, "{path}");
    }
    for site in ["cross-site", "same-site"] {
        let site = format!("sec-fetch-site: {site}");
        assert_eq!(get(address, "/api/0/status", &[&cookie, &site]).await.status(), 403, "{site}");
    }
    let same = "sec-fetch-site: same-origin";
    assert_eq!(get(address, "/api/0/status", &[&cookie, same]).await.status(), 200);

    // It only reads, whoever asks.
    for method in ["POST", "PUT", "DELETE"] {
        assert_eq!(ask(address, method, "/api/0/status", &[&bearer], "").await.status(), 405, "{method}");
        assert_eq!(ask(address, method, "/", &[], "").await.status(), 405, "{method}");
    }
    let long = format!("/api/0/samples?text={}", "x".repeat(5000));
    for (path, status) in [
        ("/other", 404),
        ("/../key", 404),
        ("/api/9/status", 404),
        ("/api/0/stop", 404),
        ("/api/0/samples?limit=501", 400),
        ("/api/0/samples?outcome=good", 400),
        ("/api/0/samples?unknown=1", 400),
        ("/api/0/metrics?points=2001", 400),
        ("/api/0/sample", 400),
        ("/api/0/sample?group=99", 404),
        (long.as_str(), 414),
    ] {
        let answer = get(address, path, &[&bearer]).await;
        assert_eq!(answer.status(), status, "{path:.60}: {}", answer.body);
    }
    for (path, headers) in
        [("/", vec![]), ("/app.js", vec![]), ("/api/0/status", vec![bearer.as_str()]), ("/api/0/status", vec![])]
    {
        let head = get(address, path, &headers).await.head;
        for sealed in [
            "content-security-policy: default-src 'none'; script-src 'self'",
            "frame-ancestors 'none'",
            "x-content-type-options: nosniff",
            "x-frame-options: deny",
            "referrer-policy: no-referrer",
            "cross-origin-resource-policy: same-origin",
        ] {
            assert!(head.contains(sealed), "{path} lacks {sealed}: {head}");
        }
        assert!(!head.contains("access-control-allow"), "{head}");
        assert!(head.contains("cache-control: no-store") || !path.starts_with("/api"), "{head}");
    }

    drop(server);
    // Nothing listens any more, as soon as the task has ended.
    within(async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_stay_small_with_ten_thousand_steps_and_two_hundred_workers() {
    const STEPS: u64 = 10_000;
    let job = Job::new();
    // With the usual patience for workers: these send no heartbeats.
    let coordinator = job.start_as("").await.unwrap();
    let services = coordinator.services();
    for place in 0..200 {
        let request = v1::RegisterRequest {
            name: format!("rollout-{place}"),
            role: v1::Role::Rollout.into(),
            host: format!("node-{place}"),
            pid: place + 1,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        };
        services.register(tonic::Request::new(request)).await.unwrap();
    }
    // As a run of that length would have left it, with about as many metrics.
    let mut file = std::fs::File::create(job.run_dir().join("metrics.jsonl")).unwrap();
    for step in 1..=STEPS {
        let mut line = serde_json::json!({"step": step, "time": 1.7e9 + step as f64});
        (0..60).for_each(|name| line[format!("metric_{name}")] = (step as f64 * 0.001 + f64::from(name)).sin().into());
        line["reward_mean"] = (step as f64 / STEPS as f64).into();
        writeln!(file, "{line}").unwrap();
    }
    let local = "127.0.0.1:0".parse().unwrap();
    let server = coordinator.observer().serve_dashboard(local, &job.spec(5, "")).await.unwrap();
    let (address, bearer) = (server.address(), format!("authorization: Bearer {}", token(&server)));

    let status = get(address, "/api/0/status", &[&bearer]).await;
    assert_eq!(status.json()["status"]["workers"].as_array().unwrap().len(), 200);
    assert!(status.body.len() < 128 << 10, "{}", status.body.len());
    let metrics = get(address, "/api/0/metrics?points=300", &[&bearer]).await;
    let json = metrics.json();
    assert!(metrics.body.len() < 2 << 20, "{}", metrics.body.len());
    let series = json["series"].as_array().unwrap();
    assert_eq!(series.len(), 62);
    assert!(series.iter().all(|series| (100..=300).contains(&series["steps"].as_array().unwrap().len())));
    assert!(json["steps_per_point"].as_u64().unwrap() >= STEPS / 300);
    let reward = series.iter().find(|series| series["name"] == "reward_mean").unwrap();
    let last = reward["highs"].as_array().unwrap().last().unwrap().as_f64().unwrap();
    assert!((last - 1.0).abs() < 1e-6, "the newest step is part of the last point: {last}");
    let part = get(address, "/api/0/metrics?names=reward_mean&first=9991&last=10000", &[&bearer]).await.json();
    assert_eq!(part["series"][0]["steps"].as_array().unwrap().len(), 10, "a range is at full resolution");

    // The lanes are looked at every two seconds, first at once.
    within(async {
        loop {
            let lanes = get(address, "/api/0/lanes?seconds=1800", &[&bearer]).await;
            assert!(lanes.body.len() < 128 << 10, "{}", lanes.body.len());
            if lanes.json()["workers"].as_array().unwrap().len() == 200 {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    })
    .await;
}
