//! An S3 server for tests: moto's, which answers as Amazon's does, conditional writes among it. It keeps all in memory.

use std::path::Path;
use std::process::Command;

use rustix::process::Signal;

use super::cluster::http_request;
use super::process::Running;
use super::tools::{self, Tool};

/// `QUORATE_PYTHON` names another.
const PYTHON: Tool = Tool { name: "python3", install: "`pip install -r .ci/requirements.txt`" };

/// What whoever asks must have in its environment; moto believes anybody.
pub const ENVIRONMENT: [(&str, &str); 3] =
    [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test"), ("AWS_REGION", "us-east-1")];

const PROGRAM: &str = "
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
server = make_server('127.0.0.1', 0, DomainDispatcherApplication(create_backend_app), threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
";

/// It is killed at the end of the test.
pub struct S3 {
    process: Running,
    address: String,
}

impl S3 {
    /// With an empty bucket; `None` where there is no Python with moto, which is said.
    pub async fn start(bucket: &str) -> Option<Self> {
        let python = tools::require_python(&PYTHON, "moto.server")?;
        Some(Self::run(&python, bucket).await)
    }

    async fn run(python: &Path, bucket: &str) -> Self {
        let mut command = Command::new(python);
        command.args(["-c", PROGRAM]).stderr(std::process::Stdio::null());
        let process = Running::start(&mut command);
        let address = format!("127.0.0.1:{}", process.line().expect("the server prints its port"));
        let (code, body) = http_request(&address, "PUT", &format!("/{bucket}"), &[], "").await.unwrap();
        assert_eq!(code, 200, "{body}");
        Self { process, address }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Answers nobody from now on, without closing a connection.
    pub fn hang(&self) {
        self.process.signal(Signal::STOP);
    }

    pub fn go_on(&self) {
        self.process.signal(Signal::CONT);
    }
}
