//! A fixed list of launches: launched one by one at first, which loads every kernel, then captured into a graph and replayed.

use std::sync::Arc;

use anyhow::Result;

use super::device::{Device, Graph, Launch};
use crate::backend::GraphReport;

/// Launches whose arguments never change.
pub struct Region {
    device: Arc<Device>,
    launches: Vec<Launch>,
    state: State,
    report: GraphReport,
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
    /// A region that is captured, unless for the reason given.
    ///
    /// # Safety
    /// Each launch must be as [`Device::launch`] asks for, with every address valid as long as the region exists.
    pub unsafe fn new(
        device: &Arc<Device>,
        launches: Vec<Launch>,
        graph_disabled: Option<String>,
    ) -> Self {
        let mut region = Self {
            device: device.clone(),
            launches,
            state: State::Direct,
            report: GraphReport::default(),
        };
        region.reset(graph_disabled);
        region
    }

    /// Starts over: captured anew, or not for the reason given. The one place where it is decided whether there is a graph.
    pub fn reset(&mut self, graph_disabled: Option<String>) {
        if let Some(reason) = &graph_disabled {
            tracing::debug!("no CUDA graph: {reason}");
        }
        self.state = match graph_disabled {
            Some(_) => State::Direct,
            None => State::Cold,
        };
        self.report = GraphReport {
            enabled: graph_disabled.is_none(),
            disabled_reason: graph_disabled,
            ..GraphReport::default()
        };
    }

    pub fn launches(&self) -> &[Launch] {
        &self.launches
    }

    pub fn report(&self) -> &GraphReport {
        &self.report
    }

    /// Queues the whole region.
    pub fn run(&mut self) -> Result<()> {
        if let State::Warm = self.state {
            self.capture();
        }
        match &self.state {
            State::Captured(graph) => {
                graph.launch()?;
                self.report.replays += 1;
            }
            State::Cold => {
                self.launch()?;
                self.report.direct_tokens += 1;
                tracing::debug!(
                    "warmed up: {} kernels launched directly",
                    self.launches.len()
                );
                self.state = State::Warm;
            }
            State::Warm | State::Direct => {
                self.launch()?;
                self.report.direct_tokens += 1;
            }
        }
        Ok(())
    }

    /// Makes a graph. Where that fails, direct launches go on.
    fn capture(&mut self) {
        // SAFETY: the addresses are valid as long as the region, which owns the graph.
        let captured = unsafe { Graph::capture(&self.device, || self.launch()) };
        self.state = match captured {
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
        };
    }

    fn launch(&self) -> Result<()> {
        for launch in &self.launches {
            // SAFETY: as the caller of `new` vouched.
            unsafe { self.device.launch(launch)? };
        }
        Ok(())
    }
}
