//! A fixed list of launches: launched one by one at first, which loads every kernel, then captured into a graph and replayed.
//! A token is computed by the first of them, or computed and chosen by all, with a graph for each.

use std::sync::Arc;

use anyhow::Result;

use super::device::{Device, Graph, Launch};
use crate::backend::{GraphReport, StepReport};

/// Launches whose arguments never change.
pub struct Region {
    device: Arc<Device>,
    launches: Vec<Launch>,
    /// Of these, those that compute.
    computing: usize,
    /// Of the launches that compute, and of all.
    states: [State; 2],
    report: GraphReport,
    step_report: StepReport,
}

/// Whether there is a graph, or why not.
enum State {
    /// Nothing has run yet.
    Cold,
    /// The next run captures.
    Warm,
    Captured(Graph),
    /// Direct launches for good.
    Direct,
}

impl Region {
    /// A region of launches that compute and, behind these, launches that choose. It is captured, unless for the reason given.
    ///
    /// # Safety
    /// Each launch must be as [`Device::launch`] asks for, with every address valid as long as the region exists.
    pub unsafe fn new(
        device: &Arc<Device>,
        computing: Vec<Launch>,
        choosing: impl IntoIterator<Item = Launch>,
        graph_disabled: Option<String>,
    ) -> Self {
        let mut region = Self {
            device: device.clone(),
            computing: computing.len(),
            launches: computing.into_iter().chain(choosing).collect(),
            states: [State::Direct, State::Direct],
            report: GraphReport::default(),
            step_report: StepReport::default(),
        };
        region.reset(graph_disabled);
        region
    }

    /// Starts over: captured anew, or not for the reason given. The one place where it is decided whether there is a graph.
    pub fn reset(&mut self, graph_disabled: Option<String>) {
        if let Some(reason) = &graph_disabled {
            tracing::debug!("no CUDA graph: {reason}");
        }
        self.states = [(); 2].map(|()| match graph_disabled {
            Some(_) => State::Direct,
            None => State::Cold,
        });
        self.report = GraphReport {
            enabled: graph_disabled.is_none(),
            disabled_reason: graph_disabled,
            ..GraphReport::default()
        };
    }

    /// Those that compute a token.
    pub fn launches(&self) -> &[Launch] {
        &self.launches[..self.computing]
    }

    pub fn report(&self) -> &GraphReport {
        &self.report
    }

    /// Starts over with the step kernel, or without it for the reason given.
    pub fn set_step(&mut self, disabled: Option<String>) {
        let reason = disabled.unwrap_or_else(|| "there is no step kernel yet".to_owned());
        self.step_report = StepReport {
            enabled: false,
            disabled_reason: Some(reason),
        };
    }

    pub fn step_report(&self) -> &StepReport {
        &self.step_report
    }

    /// Queues the launches that compute a token.
    pub fn run(&mut self) -> Result<()> {
        self.queue(false)
    }

    /// Queues those that compute a token, and choose the next.
    pub fn run_and_choose(&mut self) -> Result<()> {
        self.queue(true)
    }

    fn queue(&mut self, choosing: bool) -> Result<()> {
        let which = usize::from(choosing);
        let count = match choosing {
            true => self.launches.len(),
            false => self.computing,
        };
        if let State::Warm = self.states[which] {
            self.states[which] = self.capture(count);
        }
        match &self.states[which] {
            State::Captured(graph) => {
                graph.launch()?;
                self.report.replays += 1;
            }
            State::Cold => {
                self.launch(count)?;
                self.report.direct_tokens += 1;
                tracing::debug!("warmed up: {count} kernels launched directly");
                self.states[which] = State::Warm;
            }
            State::Warm | State::Direct => {
                self.launch(count)?;
                self.report.direct_tokens += 1;
            }
        }
        Ok(())
    }

    /// Makes a graph of the first `count` launches. Where that fails, direct launches go on.
    fn capture(&mut self, count: usize) -> State {
        // SAFETY: the addresses are valid as long as the region, which owns the graph.
        let captured = unsafe { Graph::capture(&self.device, || self.launch(count)) };
        match captured {
            Ok(graph) => {
                tracing::debug!(
                    "captured {} nodes in {:.1?}",
                    graph.nodes(),
                    graph.capture_time()
                );
                self.report.captures += 1;
                self.report.nodes = graph.nodes();
                State::Captured(graph)
            }
            Err(error) => {
                tracing::warn!(
                    "the CUDA graph could not be captured, going on with direct launches: {error:#}"
                );
                self.report.enabled = false;
                self.report.disabled_reason = Some(format!("{error:#}"));
                State::Direct
            }
        }
    }

    fn launch(&self, count: usize) -> Result<()> {
        for launch in &self.launches[..count] {
            // SAFETY: as the caller of `new` vouched.
            unsafe { self.device.launch(launch)? };
        }
        Ok(())
    }
}
