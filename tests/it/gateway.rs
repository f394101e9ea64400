//! The JSON gateway and the other HTTP paths, as any HTTP client sees them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use quorate::pb::etcd::{PutRequest, RangeRequest};
use serde_json::{Value, json};

use crate::support::cluster::{Cluster, http_get, http_post, http_request, wait_for};

fn encoded(text: &str) -> String {
    BASE64.encode(text)
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// An answer that must be a success.
async fn post(cluster: &Cluster, path: &str, body: Value) -> Value {
    let (code, text) = http_post(&cluster.endpoint(0), path, &body.to_string()).await.unwrap();
    assert_eq!(code, 200, "{path} {body}: {text}");
    parsed(&text)
}

/// An answer that must be a refusal: HTTP status, gRPC code and text.
async fn refused(cluster: &Cluster, path: &str, body: &str) -> (u16, i64, String) {
    let (status, text) = http_post(&cluster.endpoint(0), path, body).await.unwrap();
    let answer = parsed(&text);
    // A stream's failure is an object.
    let answer = if answer["error"].is_object() { answer["error"].clone() } else { answer };
    assert!(answer.get("error").is_none_or(|error| *error == answer["message"]), "clients look at either: {text}");
    (status, answer["code"].as_i64().unwrap(), answer["message"].as_str().unwrap().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn gateway_and_grpc_are_one_store() {
    let cluster = Cluster::start(1).await;
    for (version, key) in [("v3", "a"), ("v3beta", "b")] {
        let put = json!({ "key": encoded(key), "value": encoded("x\u{0}y") });
        let answer = post(&cluster, &format!("/{version}/kv/put"), put).await;
        let revision: i64 = answer["header"]["revision"].as_str().expect("64-bit numbers are strings").parse().unwrap();
        let mut kv = cluster.kv(0);
        let read =
            kv.range(RangeRequest { key: key.to_owned().into(), ..Default::default() }).await.unwrap().into_inner();
        assert_eq!((read.kvs[0].value(), read.kvs[0].mod_revision()), (&b"x\0y"[..], revision));
        let put = PutRequest { key: key.to_owned().into(), value: "z".into(), ..Default::default() };
        kv.put(put).await.unwrap();
        let range = json!({ "key": encoded(key) });
        let answer = post(&cluster, &format!("/{version}/kv/range"), range).await;
        let expected = json!({
            "key": encoded(key), "value": encoded("z"), "version": "2",
            "create_revision": revision.to_string(), "mod_revision": (revision + 1).to_string(),
        });
        assert_eq!(answer["kvs"], json!([expected]), "unset fields are left out");
        assert_eq!((&answer["count"], answer.get("more")), (&json!("1"), None));
    }
    let header = post(&cluster, "/v3/kv/range", json!({ "key": encoded("a") })).await["header"].clone();
    let member = cluster.member_id(0).await;
    assert_eq!(header["member_id"], json!(member.to_string()));
    assert_eq!(header["cluster_id"], json!(cluster.cluster_id(0).await.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_kv_request_goes_through_the_gateway() {
    let cluster = Cluster::start(1).await;
    let txn = json!({
        "compare": [{ "result": "EQUAL", "target": "VERSION", "key": encoded("k"), "version": "0" }],
        "success": [
            { "requestPut": { "key": encoded("k"), "value": encoded("1") } },
            { "request_range": { "key": encoded("k") } },
        ],
        "failure": [{ "request_delete_range": { "key": encoded("k") } }],
    });
    let first = post(&cluster, "/v3/kv/txn", txn.clone()).await;
    assert_eq!(first["succeeded"], json!(true));
    assert_eq!(first["responses"][1]["response_range"]["kvs"][0]["value"], json!(encoded("1")));
    let second = post(&cluster, "/v3/kv/txn", txn).await;
    assert_eq!(second.get("succeeded"), None, "false is left out: {second}");
    assert_eq!(second["responses"][0]["response_delete_range"]["deleted"], json!("1"));

    let put = json!({ "key": encoded("k"), "value": encoded("2") });
    let revision: i64 =
        post(&cluster, "/v3/kv/put", put).await["header"]["revision"].as_str().unwrap().parse().unwrap();
    let deleted = json!({ "key": encoded("k"), "prev_kv": true });
    let deleted = post(&cluster, "/v3/kv/deleterange", deleted).await;
    assert_eq!(deleted["prev_kvs"][0]["value"], json!(encoded("2")));
    let past = json!({ "key": encoded("k"), "revision": revision });
    assert_eq!(post(&cluster, "/v3/kv/range", past).await["kvs"][0]["value"], json!(encoded("2")));
    post(&cluster, "/v3/kv/compaction", json!({ "revision": (revision + 1).to_string(), "physical": true })).await;
    let text =
        refused(&cluster, "/v3/kv/range", &json!({ "key": encoded("k"), "revision": revision }).to_string()).await;
    assert_eq!(text, (400, 11, "etcdserver: mvcc: required revision has been compacted".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_say_what_is_wrong() {
    let mut cluster = Cluster::new(1);
    cluster.set("limits.request_bytes_max", "64KiB");
    cluster.start_all().await;
    let cases = [
        ("/v3/kv/put", "{", 400, 3, "quorate: request body: "),
        ("/v3/kv/put", r#"{"key":"no base64!"}"#, 400, 3, "quorate: request body: "),
        ("/v3/lease/keepalive", "nonsense", 400, 3, "quorate: request body: "),
        ("/v3/kv/put", "{}", 400, 3, "etcdserver: key is not provided"),
        ("/v3/kv/nothing", "{}", 404, 5, "Not Found"),
        ("/v3/auth/enable", "{}", 400, 9, "etcdserver: root user does not exist"),
        ("/v3/auth/authenticate", "{}", 400, 9, "etcdserver: authentication is not enabled"),
        ("/v3/auth/role/get", r#"{"role": "r"}"#, 400, 9, "etcdserver: role name not found"),
        ("/v3/maintenance/downgrade", r#"{"version":"2.0"}"#, 400, 3, "etcdserver: invalid downgrade target version"),
    ];
    for (path, body, status, code, text) in cases {
        let found = refused(&cluster, path, body).await;
        assert!(found.0 == status && found.1 == code && found.2.starts_with(text), "{path} {body}: {found:?}");
    }
    for (letters, why) in [(2 << 20, "larger than 1179648 bytes"), (800 << 10, "(614407 vs. 589824)")] {
        let large = json!({ "key": encoded("k"), "value": "A".repeat(letters) }).to_string();
        let (status, code, text) = refused(&cluster, "/v3/kv/put", &large).await;
        assert!((status, code) == (429, 8) && text.contains(why), "{text}");
    }
    let over = json!({ "key": encoded("k"), "value": "A".repeat(100 << 10) }).to_string();
    assert_eq!(refused(&cluster, "/v3/kv/put", &over).await.2, "etcdserver: request is too large");
    for (method, path, status, code) in [
        ("GET", "/v3/kv/range", 501, 12),
        ("PUT", "/v3beta/kv/range", 501, 12),
        ("GET", "/v3/kv/nothing", 404, 5),
        ("POST", "/v3/kv/rangestream", 404, 5),
    ] {
        let (found, text) = http_request(&cluster.endpoint(0), method, path, &[], "").await.unwrap();
        assert_eq!((found, parsed(&text)["code"].as_i64()), (status, Some(code)), "{method} {path}: {text}");
    }
    for path in ["/nothing", "/v4/kv/range", "/readyz/nothing", "/livez/nothing"] {
        let found = http_get(&cluster.endpoint(0), path).await.unwrap();
        assert_eq!(found, (404, "404 page not found\n".into()), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_programs_send_that_etcd_takes_is_taken() {
    let cluster = Cluster::start(1).await;
    // `base64` breaks its lines, and so do Python's and Java's encoders.
    let long = "k".repeat(100);
    let whole = encoded(&long);
    let broken: Vec<_> = whole.as_bytes().chunks(76).map(String::from_utf8_lossy).collect();
    post(&cluster, "/v3/kv/put", json!({ "key": broken.join("\n") + "\n", "value": broken.join("\r\n") })).await;
    assert_eq!(cluster.get(0, &long).await.as_ref(), Some(&long));

    // A keep-alive of nothing says nothing.
    let endpoint = cluster.endpoint(0);
    assert_eq!(http_post(&endpoint, "/v3/lease/keepalive", "").await.unwrap(), (200, String::new()));
    let lease = post(&cluster, "/v3/lease/grant", json!({ "TTL": 60 })).await["ID"].clone();
    let two = format!("{}\n{}", json!({ "ID": lease }), json!({ "ID": "7" }));
    let (code, text) = http_post(&endpoint, "/v3/lease/keepalive", &two).await.unwrap();
    let lines: Vec<Value> = text.lines().map(parsed).collect();
    assert_eq!((code, lines.len()), (200, 2), "{text}");
    assert_eq!((&lines[0]["result"]["TTL"], lines[1]["result"].get("TTL")), (&json!("60"), None));

    let hash = post(&cluster, "/v3/maintenance/hash", json!({})).await;
    assert!(hash["hash"].is_u64() && hash.get("compact_revision").is_none(), "of all data, not of revisions: {hash}");

    // Many at once that ask before they send, as curl does with a large body; what follows the body is the next request.
    let value = "v".repeat(20 << 10);
    let bursts = (0..50).map(|i| {
        let body = json!({ "key": encoded(&format!("burst{i}")), "value": encoded(&value) }).to_string();
        let endpoint = endpoint.clone();
        async move {
            let headers = [("Expect", "100-continue"), ("Content-Type", "application/json")];
            let text = http_request(&endpoint, "POST", "/v3/kv/put", &headers, &body).await.unwrap().1;
            // What came first said only that it may go on.
            assert!(text.contains("\"revision\""), "{text}");
        }
    });
    futures_util::future::join_all(bursts).await;
    let all = json!({ "key": encoded("burst"), "range_end": encoded("bursu"), "count_only": true });
    assert_eq!(post(&cluster, "/v3/kv/range", all).await["count"], "50");
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_become_metadata() {
    let mut cluster = Cluster::new(3);
    cluster.start_all().await;
    cluster.kill(1);
    cluster.kill(2);
    let ask = async |headers: &[(&str, &str)]| {
        let body = json!({ "key": encoded("k"), "serializable": true }).to_string();
        http_request(&cluster.endpoint(0), "POST", "/v3/kv/range", headers, &body).await.unwrap()
    };
    wait_for("the survivor to know no leader", async || {
        let (code, text) = ask(&[("Grpc-Metadata-hasleader", "true")]).await;
        if code == 503 && text.contains("etcdserver: no leader") { Ok(()) } else { Err(format!("{code} {text}")) }
    })
    .await;
    assert_eq!(ask(&[]).await.0, 200, "a serializable read needs none");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_comes_line_by_line() {
    let cluster = Cluster::start(1).await;
    for n in 0..50 {
        cluster.put(0, &format!("k{n}"), &"v".repeat(5000)).await;
    }
    let (code, text) = http_post(&cluster.endpoint(0), "/v3/maintenance/snapshot", "").await.unwrap();
    assert_eq!(code, 200);
    let mut file = Vec::new();
    let mut remaining = None;
    for line in text.lines() {
        let result = parsed(line)["result"].clone();
        file.extend(BASE64.decode(result["blob"].as_str().expect(line)).unwrap());
        remaining = Some(result["remaining_bytes"].as_str().unwrap_or("0").parse::<u64>().unwrap());
    }
    assert!(text.lines().count() > 3 && remaining == Some(0), "{} lines", text.lines().count());
    assert_eq!(file.len() % 512, 32);
}

#[tokio::test(flavor = "multi_thread")]
async fn health_can_be_asked_of_one_member_and_without_an_alarm() {
    let mut cluster = Cluster::new(3);
    cluster.start_all().await;
    for path in ["/health", "/health?serializable=true", "/health?exclude=NOSPACE", "/health?serializable"] {
        cluster.wait_http_at(&cluster.endpoint(0), path, 200, &[r#""health":"true""#]).await;
    }
    cluster
        .wait_http_at(
            &cluster.endpoint(0),
            "/readyz?verbose",
            200,
            &["[+]data_corruption ok\n", "[+]serializable_read ok\n", "[+]linearizable_read ok\n", "ok\n"],
        )
        .await;
    cluster.wait_http_at(&cluster.endpoint(0), "/livez?verbose", 200, &["[+]", "ok\n"]).await;
    for check in ["data_corruption", "serializable_read", "linearizable_read", "non_learner"] {
        let path = format!("/readyz/{check}");
        assert_eq!(http_get(&cluster.endpoint(0), &path).await.unwrap(), (200, "ok\n".into()), "{path}");
        let (_, text) = http_get(&cluster.endpoint(0), &(path + "?verbose")).await.unwrap();
        assert_eq!(text, format!("[+]{check} ok\nok\n"));
    }
    assert_eq!(http_get(&cluster.endpoint(0), "/livez/serializable_read").await.unwrap().0, 200);
    let (_, text) =
        http_get(&cluster.endpoint(0), "/readyz?verbose&exclude=linearizable_read&exclude=x").await.unwrap();
    assert_eq!(text, "[+]data_corruption ok\n[+]serializable_read ok\nok\n");
    let (_, version) = http_get(&cluster.endpoint(0), "/version").await.unwrap();
    assert!(
        ["etcdserver", "etcdcluster", "storage"].iter().all(|name| parsed(&version)[name].is_string()),
        "{version}"
    );
    let (_, variables) = http_get(&cluster.endpoint(0), "/debug/vars").await.unwrap();
    let status = &parsed(&variables)["raft.status"];
    assert!(status["applied"].as_u64() > Some(0) && parsed(&variables)["cmdline"].is_array(), "{variables}");
    wait_for("an alarm to be taken", async || {
        let body =
            json!({ "action": "ACTIVATE", "alarm": "NOSPACE", "memberID": cluster.member_id(1).await.to_string() });
        let (code, text) = http_post(&cluster.endpoint(1), "/v3/maintenance/alarm", &body.to_string()).await.unwrap();
        if code == 200 { Ok(()) } else { Err(text) }
    })
    .await;
    cluster.wait_http_at(&cluster.endpoint(0), "/health", 503, &["ALARM NOSPACE"]).await;
    cluster.wait_http_at(&cluster.endpoint(0), "/health?exclude=NOSPACE", 200, &["true"]).await;
    cluster.kill(1);
    cluster.kill(2);
    cluster.wait_http_at(&cluster.endpoint(0), "/health?exclude=NOSPACE", 503, &["RAFT NO LEADER"]).await;
    cluster.wait_http_at(&cluster.endpoint(0), "/health?exclude=NOSPACE&serializable=true", 200, &["true"]).await;
    cluster
        .wait_http_at(
            &cluster.endpoint(0),
            "/readyz",
            503,
            &["[+]serializable_read ok", "[-]linearizable_read failed: "],
        )
        .await;
    cluster
        .wait_http_at(&cluster.endpoint(0), "/readyz/linearizable_read", 503, &["[-]linearizable_read failed: "])
        .await;
    for path in ["/readyz?exclude=linearizable_read", "/readyz/serializable_read", "/livez"] {
        assert_eq!(http_get(&cluster.endpoint(0), path).await.unwrap().0, 200, "{path}");
    }
}

/// What a browser sends for a page, by hand: the code of the answer, its head, and its body.
async fn browse(cluster: &Cluster, head: &str, body: &[u8]) -> (u16, String) {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(cluster.endpoint(0)).await.unwrap();
    let head = format!("{head}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(&[head.as_bytes(), body].concat()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    (answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect(&answer), answer)
}

/// Any page that is open in a browser may send these without asking; and the key is still there afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn page_in_a_browser_deletes_nothing_and_programs_go_on() {
    let mut cluster = Cluster::new(1);
    cluster.set("http.cors", "https://ui.example.org");
    cluster.start_all().await;
    cluster.put(0, "k", "v").await;
    let host = cluster.endpoint(0);
    let all = json!({ "key": encoded("\0"), "range_end": encoded("\0") }).to_string();
    let path = "POST /v3/kv/deleterange HTTP/1.1";
    let evil = "Origin: http://evil.example";
    let forged: [(String, u16); 6] = [
        (format!("{path}\r\nHost: {host}\r\n{evil}\r\nContent-Type: text/plain"), 403),
        (format!("{path}\r\nHost: {host}\r\n{evil}\r\nContent-Type: application/x-www-form-urlencoded"), 403),
        (format!("{path}\r\nHost: {host}\r\n{evil}"), 403),
        (format!("{path}\r\nHost: {host}\r\nContent-Type: text/plain"), 415),
        (format!("{path}\r\nHost: evil.example\r\n{evil}\r\nContent-Type: application/json"), 421),
        (
            format!(
                "OPTIONS /v3/kv/deleterange HTTP/1.1\r\nHost: {host}\r\n{evil}\r\nAccess-Control-Request-Method: POST"
            ),
            403,
        ),
    ];
    for (head, expected) in forged {
        let (code, answer) = browse(&cluster, &head, all.as_bytes()).await;
        assert_eq!(code, expected, "{head}: {answer}");
        assert!(!answer.to_ascii_lowercase().contains("access-control-allow-origin"), "{answer}");
    }
    // The same call in gRPC's own form, which a page can build as well.
    let delete = [&[0, 0, 0, 0, 6][..], b"\x0a\x01\x00\x12\x01\x00"].concat();
    for service in ["KV/DeleteRange", "Lease/LeaseLeases", "Maintenance/Defragment"] {
        // And as a page of a name that was made to point here, which may name any type.
        for (name, kind, expected) in [
            (&host[..], "text/plain", 415),
            ("rebound.example", "application/grpc", 505),
            (&host[..], "application/grpc+proto", 505),
        ] {
            let head = format!(
                "POST /etcdserverpb.{service} HTTP/1.1\r\nHost: {name}\r\nContent-Type: {kind}\r\nTE: trailers"
            );
            let (code, answer) = browse(&cluster, &head, &delete).await;
            assert_eq!(code, expected, "{service}: {answer}");
        }
    }
    assert_eq!(cluster.get(0, "k").await.as_deref(), Some("v"));
    let (code, answer) =
        browse(&cluster, "GET / HTTP/1.1\r\nHost: rebound.example\r\nUser-Agent: Mozilla/5.0", b"").await;
    assert_eq!(code, 421, "{answer}");
    let (code, answer) =
        browse(&cluster, &format!("GET / HTTP/1.1\r\nHost: {host}\r\nUser-Agent: Mozilla/5.0"), b"").await;
    let head = answer.to_ascii_lowercase();
    assert_eq!(code, 200, "{answer}");
    assert!(head.contains("frame-ancestors 'none'") && head.contains("nosniff"), "{answer}");
    // Its one script comes from the member itself; a script that somebody got into the page does not run.
    assert!(head.contains("script-src 'self'") && head.matches("<script").count() == 1, "{answer}");
    assert!(head.contains("<script src="), "{answer}");

    let ui = "Origin: https://ui.example.org";
    let head = format!("POST /v3/kv/range HTTP/1.1\r\nHost: {host}\r\n{ui}\r\nContent-Type: application/json");
    let (code, answer) = browse(&cluster, &head, json!({ "key": encoded("k") }).to_string().as_bytes()).await;
    assert!(code == 200 && answer.contains("access-control-allow-origin: https://ui.example.org"), "{answer}");
    // As `curl -d` has it.
    let head = format!(
        "{path}\r\nHost: any.example\r\nContent-Type: application/x-www-form-urlencoded\r\nUser-Agent: curl/8.5.0"
    );
    let (code, answer) = browse(&cluster, &head, all.as_bytes()).await;
    assert_eq!(code, 200, "{answer}");
    assert_eq!(cluster.get(0, "k").await, None);
}
