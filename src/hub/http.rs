//! Requests to the hub: where they go, who sees the token, and what may be tried again.

use std::{fmt::Display, fs, io::ErrorKind, thread, time::Duration};

use anyhow::{Context, Error, Result, anyhow, ensure};
use hf_hub::Repo;
use ureq::{
    Agent, Body,
    http::{HeaderValue, Response, StatusCode, Uri, header},
};

use super::{Observer, RepoInfo, cache};

const MOST_REDIRECTS: usize = 10;
const CONNECT: Duration = Duration::from_secs(15);
/// Longer silence than this is a broken connection.
const SILENCE: Duration = Duration::from_secs(60);

/// A hub, and who we are to it.
pub struct Http {
    agent: Agent,
    /// Without a slash at its end.
    endpoint: String,
    /// Sent to the endpoint, and nowhere else.
    token: Option<HeaderValue>,
}

/// Why a request did not do.
pub enum Failure {
    /// It would fail again.
    Final(Error),
    /// It may go well later, after the time that the server asks for.
    Passing(Error, Option<Duration>),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl Http {
    pub fn from_env() -> Result<Self> {
        let endpoint = cache::variable("HF_ENDPOINT");
        let endpoint = match &endpoint {
            None => "https://huggingface.co",
            Some(endpoint) => endpoint.trim_end_matches('/'),
        };
        ensure!(
            endpoint.starts_with("https://") || endpoint.starts_with("http://"),
            "HF_ENDPOINT is {endpoint:?}, expected the address of a hub, such as https://huggingface.co"
        );
        let config = Agent::config_builder()
            .user_agent(concat!("sharpi/", env!("CARGO_PKG_VERSION")))
            // Where a redirect leads, and with what headers, is decided here.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .https_only(endpoint.starts_with("https:"))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .build();
        Ok(Self {
            agent: config.into(),
            endpoint: endpoint.to_owned(),
            token: token()?,
        })
    }

    /// What messages call the hub.
    pub fn host(&self) -> String {
        host(&self.endpoint)
    }

    /// What the hub says about `repo`.
    pub fn repo_info(&self, repo: &str) -> Result<RepoInfo, Failure> {
        let api = Repo::model(repo.to_owned()).api_url();
        let url = format!("{}/api/{api}?blobs=true", self.endpoint);
        let mut response = self.get(url, 0, repo)?;
        let info = response.body_mut().read_json();
        Ok(info.map_err(|error| {
            // Not as a cause: a broken connection is no pipe of ours.
            anyhow!("{} answers no description of {repo}: {error}", self.host())
        })?)
    }

    /// Where the file `name` of `repo` is at `revision`.
    pub fn file_url(&self, repo: &str, revision: &str, name: &str) -> String {
        let mut url = format!("{}/{repo}/resolve/{revision}/", self.endpoint);
        for byte in name.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                    url.push(byte.into())
                }
                _ => url += &format!("%{byte:02X}"),
            }
        }
        url
    }

    /// Gets `url`, which belongs to `repo`, from the byte `start` on, wherever it leads. The response is 200 or 206.
    pub fn get(&self, mut url: String, start: u64, repo: &str) -> Result<Response<Body>, Failure> {
        for _ in 0..=MOST_REDIRECTS {
            let mut request = self
                .agent
                .get(&url)
                .header(header::ACCEPT_ENCODING, "identity");
            if start > 0 {
                request = request.header(header::RANGE, format!("bytes={start}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| self.is_mine(&url)) {
                request = request.header(header::AUTHORIZATION, token);
            }
            let response = request.call().map_err(|error| unreached(&url, &error))?;
            if !response.status().is_redirection() {
                return self.accept(response, &url, repo);
            }
            url = target(&url, &response)?;
        }
        Err(anyhow!("{} redirects in a circle", host(&url)).into())
    }

    /// Whether `url` is the hub's own, down to the port.
    fn is_mine(&self, url: &str) -> bool {
        let rest = url.strip_prefix(&self.endpoint);
        rest.is_some_and(|rest| rest.starts_with('/'))
    }

    fn accept(
        &self,
        response: Response<Body>,
        url: &str,
        repo: &str,
    ) -> Result<Response<Body>, Failure> {
        let status = response.status();
        let host = host(url);
        let refused = match status {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(response),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if self.is_mine(url) => {
                let token = match self.token {
                    None => "set HF_TOKEN to a token that may read it",
                    Some(_) => {
                        "use a token that may read it (the present one is from HF_TOKEN or `hf auth login`)"
                    }
                };
                anyhow!(
                    "{host} refuses {repo} ({status}): there is no such repository, or it is private or gated. For a \
                     gated one, accept its licence at {}/{repo}; for both, {token}",
                    self.endpoint
                )
            }
            StatusCode::NOT_FOUND if self.is_mine(url) => {
                anyhow!("{host} has no {repo}, or not this file of it ({status}): check the name")
            }
            StatusCode::TOO_MANY_REQUESTS => {
                return Err(passing(
                    anyhow!("{host} has had too many requests from here ({status})"),
                    &response,
                ));
            }
            _ if status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT => {
                return Err(passing(
                    anyhow!("{host} cannot answer now ({status})"),
                    &response,
                ));
            }
            _ => anyhow!("{host} answers {status} when asked for {repo}"),
        };
        Err(refused.into())
    }
}

/// The token of the environment, else that of a login.
fn token() -> Result<Option<HeaderValue>> {
    let saved = || {
        let path = cache::variable("HF_TOKEN_PATH").map_or_else(
            || cache::home().map(|home| home.join("token")),
            |path| Some(path.into()),
        );
        fs::read_to_string(path?).ok()
    };
    let Some(token) = cache::variable("HF_TOKEN").or_else(saved) else {
        return Ok(None);
    };
    let token = token.trim();
    if token.is_empty() {
        return Ok(None);
    }
    // The error must not show it.
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
        .ok()
        .context("the token of HF_TOKEN, or of Hugging Face's token file, has characters that no token has")?;
    value.set_sensitive(true);
    Ok(Some(value))
}

fn passing(error: Error, response: &Response<Body>) -> Failure {
    let asked = response.headers().get(header::RETRY_AFTER);
    let seconds = asked.and_then(|asked| asked.to_str().ok()?.trim().parse().ok());
    Failure::Passing(error, seconds.map(Duration::from_secs))
}

/// No answer at all. What the system says about a connection may pass; an unknown name or a wrong certificate does not.
fn unreached(url: &str, error: &ureq::Error) -> Failure {
    let cannot = |why: &dyn Display| anyhow!("cannot reach {}: {why}", host(url));
    match error {
        ureq::Error::Timeout(_) => Failure::Passing(cannot(error), None),
        ureq::Error::Io(error) => {
            let of_connection =
                error.raw_os_error().is_some() || error.kind() == ErrorKind::UnexpectedEof;
            match of_connection {
                true => Failure::Passing(cannot(error), None),
                false => Failure::Final(cannot(error)),
            }
        }
        _ => Failure::Final(cannot(error)),
    }
}

/// Where a redirect from `url` leads.
fn target(url: &str, response: &Response<Body>) -> Result<String> {
    let location = response.headers().get(header::LOCATION);
    let location = location.and_then(|location| location.to_str().ok());
    let from: Uri = url.parse().context("reading an address")?;
    let target = match (location, from.scheme_str(), from.authority()) {
        (Some(path), Some(scheme), Some(authority))
            if path.starts_with('/') && !path.starts_with("//") =>
        {
            Some(format!("{scheme}://{authority}{path}"))
        }
        (Some(url), ..) if url.contains("://") => Some(url.to_owned()),
        _ => None,
    };
    target.with_context(|| format!("{} redirects to nowhere", host(url)))
}

/// The host of `url`, for messages: a query may hold secrets, and so may what precedes the host.
fn host(url: &str) -> String {
    let uri = url.parse::<Uri>().ok();
    let authority = uri.as_ref().and_then(Uri::authority);
    match authority {
        Some(authority) => match authority.port() {
            Some(port) => format!("{}:{port}", authority.host()),
            None => authority.host().to_owned(),
        },
        None => "the hub".to_owned(),
    }
}

/// How often something is tried, and when again.
pub struct Patience {
    failures: u32,
}

impl Patience {
    const TRIES: u32 = 5;
    const FIRST_WAIT: Duration = Duration::from_millis(500);
    /// Who is asked to wait longer had better do something else meanwhile.
    const LONGEST_WAIT: Duration = Duration::from_secs(60);

    pub fn new() -> Self {
        Self { failures: 0 }
    }

    /// Waits until the next try.
    ///
    /// # Errors
    /// `failure`, where another try is of no use.
    pub fn wait(&mut self, failure: Failure, observer: &mut dyn Observer) -> Result<()> {
        let (error, asked) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Passing(error, asked) => (error, asked),
        };
        self.failures += 1;
        ensure!(
            self.failures < Self::TRIES,
            "{error:#}; tried {} times, try again later",
            Self::TRIES
        );
        let usual = Self::FIRST_WAIT * 2u32.pow(self.failures - 1);
        let wait = asked.unwrap_or(usual);
        ensure!(
            wait <= Self::LONGEST_WAIT,
            "{error:#}; it asks to wait {} s, try again then",
            wait.as_secs()
        );
        observer.notice(&format!(
            "{error:#}; trying again in {:.1} s",
            wait.as_secs_f64()
        ));
        thread::sleep(wait);
        Ok(())
    }
}
