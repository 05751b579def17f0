//! A hub on this machine's loopback, and the host that it redirects to for files, both of which can misbehave.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex},
    thread,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const REPO: &str = "test/demo";
/// In the query of the address that files are redirected to.
pub const SIGNATURE: &str = "signed-by-the-hub";

/// A file of the repository.
#[derive(Clone)]
pub struct Hosted {
    pub name: String,
    pub bytes: Vec<u8>,
    /// What the hub says of it.
    pub description: Value,
}

impl Hosted {
    /// A large file, as models are.
    pub fn new(name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        let description = json!({
            "rfilename": name,
            "size": bytes.len(),
            "blobId": "0".repeat(40),
            "lfs": {"sha256": sha256(&bytes), "size": bytes.len(), "pointerSize": 134},
        });
        Self {
            name: name.to_owned(),
            bytes,
            description,
        }
    }

    /// A file small enough for git.
    pub fn small(name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        let bytes = bytes.into();
        let description = json!({"rfilename": name, "size": bytes.len(), "blobId": "5".repeat(40)});
        Self {
            name: name.to_owned(),
            bytes,
            description,
        }
    }
}

pub fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What goes wrong with one request.
#[derive(Clone)]
pub enum Fault {
    /// This status, with a header.
    Status(u16, &'static str),
    /// The connection closes after so many bytes of the body.
    Cut(usize),
    /// Nothing more comes after so many bytes, until the hub is released.
    Stall(usize),
    /// One byte is another.
    Damage,
    /// The whole file comes, whatever was asked for.
    NoRanges,
    /// This is what its length is said to be.
    Length(usize),
    /// More bytes than it has, with no length said.
    Endless,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    /// Whether the hub got it, or the host that files come from.
    pub to_hub: bool,
    pub path: String,
    pub range: Option<String>,
    pub authorization: Option<String>,
}

#[derive(Default)]
struct State {
    revision: String,
    files: Vec<Hosted>,
    api_faults: VecDeque<Fault>,
    file_faults: VecDeque<Fault>,
    log: Vec<Request>,
    released: bool,
}

/// The hub, with one repository.
pub struct FakeHub {
    pub address: String,
    state: Arc<(Mutex<State>, Condvar)>,
}

impl FakeHub {
    pub fn new(files: impl Into<Vec<Hosted>>) -> Self {
        let state = State {
            revision: "a".repeat(40),
            files: files.into(),
            ..State::default()
        };
        let state = Arc::new((Mutex::new(state), Condvar::new()));
        let files_host = listen(Arc::clone(&state), None);
        let address = listen(Arc::clone(&state), Some(files_host));
        Self { address, state }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.0.lock().expect("no answer panics"));
        self.state.1.notify_all();
    }

    /// The next requests to the hub's interface go wrong so.
    pub fn fail_api(&self, faults: impl IntoIterator<Item = Fault>) -> &Self {
        self.change(|state| state.api_faults.extend(faults));
        self
    }

    /// The next requests for a file go wrong so.
    pub fn fail_files(&self, faults: impl IntoIterator<Item = Fault>) -> &Self {
        self.change(|state| state.file_faults.extend(faults));
        self
    }

    /// Lets go on what stalls, now and later.
    pub fn release(&self) {
        self.change(|state| state.released = true);
    }

    /// Puts another revision in the place of the newest.
    pub fn publish(&self, revision: &str, files: impl Into<Vec<Hosted>>) {
        self.change(|state| {
            state.revision = revision.to_owned();
            state.files = files.into();
        });
    }

    /// All requests since the last time that this was asked.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.state.0.lock().expect("no answer panics").log)
    }

    /// Of these, those that were answered with bytes of a file.
    pub fn file_requests(&self) -> Vec<Request> {
        let all = self.requests().into_iter();
        all.filter(|request| !request.to_hub).collect()
    }
}

/// Answers on a port of its own, which it returns as an address.
fn listen(state: Arc<(Mutex<State>, Condvar)>, files_host: Option<String>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("it is bound");
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (state, files_host) = (Arc::clone(&state), files_host.clone());
            // A client that goes away is no failure of the test.
            thread::spawn(move || {
                stream.and_then(|stream| answer(&state, files_host.as_deref(), stream))
            });
        }
    });
    format!("http://{address}")
}

fn read_request(stream: &TcpStream, to_hub: bool) -> Request {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next().unwrap_or_default();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let header = |name: &str| {
        let of_name = headers.iter().filter_map(|line| line.split_once(": "));
        let mut values = of_name.filter(|(header, _)| header.eq_ignore_ascii_case(name));
        values.next().map(|(_, value)| value.to_owned())
    };
    Request {
        to_hub,
        path: first.split(' ').nth(1).unwrap_or_default().to_owned(),
        range: header("range"),
        authorization: header("authorization"),
    }
}

fn answer(
    state: &(Mutex<State>, Condvar),
    files_host: Option<&str>,
    mut stream: TcpStream,
) -> std::io::Result<()> {
    let request = read_request(&stream, files_host.is_some());
    let mut state_now = state.0.lock().expect("no answer panics");
    state_now.log.push(request.clone());
    let api = format!("/api/models/{REPO}/revision/main?blobs=true");
    let resolve = format!("/{REPO}/resolve/{}/", state_now.revision);
    if let Some(host) = files_host {
        if request.path == api {
            let info = json!({
                "id": REPO,
                "sha": state_now.revision,
                "siblings": state_now.files.iter().map(|file| &file.description).collect::<Vec<_>>(),
            });
            let fault = state_now.api_faults.pop_front();
            drop(state_now);
            return match fault {
                Some(Fault::Status(status, header)) => write_status(&mut stream, status, header),
                Some(_) => panic!("the interface fails by its status only"),
                None => write_body(&mut stream, "200 OK", info.to_string().as_bytes()),
            };
        }
        return match request.path.strip_prefix(&resolve) {
            Some(name) => write_status(
                &mut stream,
                302,
                &format!("Location: {host}/{name}?{SIGNATURE}"),
            ),
            None => write_status(&mut stream, 404, ""),
        };
    }
    let name = request.path.strip_suffix(&format!("?{SIGNATURE}"));
    let name = name.and_then(|path| path.strip_prefix('/'));
    let file = state_now
        .files
        .iter()
        .find(|file| Some(&file.name[..]) == name)
        .cloned();
    let fault = state_now.file_faults.pop_front();
    drop(state_now);
    match file {
        Some(file) => send_file(state, &mut stream, &request, file.bytes, fault),
        None => write_status(&mut stream, 403, ""),
    }
}

fn send_file(
    state: &(Mutex<State>, Condvar),
    stream: &mut TcpStream,
    request: &Request,
    mut bytes: Vec<u8>,
    fault: Option<Fault>,
) -> std::io::Result<()> {
    if let Some(Fault::Status(status, header)) = fault {
        return write_status(stream, status, header);
    }
    let size = bytes.len();
    let range = request
        .range
        .as_deref()
        .filter(|_| !matches!(fault, Some(Fault::NoRanges)));
    let start = range.map(|range| {
        let start = range
            .strip_prefix("bytes=")
            .and_then(|range| range.strip_suffix('-'));
        start
            .and_then(|start| start.parse::<usize>().ok())
            .expect("a range to the end")
    });
    let mut body = bytes.split_off(start.unwrap_or(0));
    let status = match start {
        Some(start) => format!(
            "206 Partial Content\r\nContent-Range: bytes {start}-{}/{size}",
            size - 1
        ),
        None => "200 OK".to_owned(),
    };
    let mut length = format!("Content-Length: {}\r\n", body.len());
    let mut sent = body.len();
    match fault {
        Some(Fault::Cut(bytes) | Fault::Stall(bytes)) => sent = bytes,
        Some(Fault::Damage) => body[sent / 2] ^= 1,
        Some(Fault::Length(bytes)) => length = format!("Content-Length: {bytes}\r\n"),
        Some(Fault::Endless) => {
            length = String::new();
            body.extend([0; 100]);
            sent = body.len();
        }
        _ => {}
    }
    write!(
        stream,
        "HTTP/1.1 {status}\r\n{length}Connection: close\r\n\r\n"
    )?;
    stream.write_all(&body[..sent])?;
    stream.flush()?;
    if matches!(fault, Some(Fault::Stall(_))) {
        let released = state
            .1
            .wait_while(state.0.lock().expect("no answer panics"), |state| {
                !state.released
            });
        drop(released.expect("no answer panics"));
        stream.write_all(&body[sent..])?;
    }
    Ok(())
}

fn write_status(stream: &mut TcpStream, status: u16, header: &str) -> std::io::Result<()> {
    let header = match header {
        "" => String::new(),
        header => format!("\r\n{header}"),
    };
    write_body(stream, &format!("{status} As Told{header}"), b"told so")
}

fn write_body(stream: &mut TcpStream, status: &str, body: &[u8]) -> std::io::Result<()> {
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    )?;
    stream.write_all(body)?;
    stream.flush()
}
