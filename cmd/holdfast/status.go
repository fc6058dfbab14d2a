package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"holdfast/api"
	"holdfast/ca"
	"holdfast/contract"
	"holdfast/identity"
	"holdfast/ledger"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

// status is what "holdfast status" shows.
type status struct {
	Grid      identity.GridID  `json:"grid"`
	Height    int64            `json:"height"`
	Warnings  []string         `json:"warnings,omitempty"`
	Blobs     *api.BlobPlace   `json:"blobs"` // null: the validator does not say
	Nodes     []nodeStatus     `json:"nodes"`
	Contracts []contractStatus `json:"contracts"`
	Workloads []workloadStatus `json:"workloads"`
	Routes    []routeStatus    `json:"routes"`
}

type nodeStatus struct {
	ID    identity.NodeID `json:"id"`
	Name  string          `json:"name"`
	Farm  string          `json:"farm"`
	State string          `json:"state"` // up, down
	Lease string          `json:"lease"` // how long it counts as alive without being heard
	Since time.Time       `json:"since"`
	Key   string          `json:"key"` // where its key is
}

type contractStatus struct {
	ID       contract.ID `json:"id"`
	Name     string      `json:"name"`
	Revision int         `json:"revision"`
	State    string      `json:"state"`

	Trial  *trialStatus    `json:"trial,omitzero"`  // its revision is not known to be good yet, and takes the place of one that is
	Undone *ledger.Failure `json:"undone,omitzero"` // the newest revision was rolled back, and why
}

// trialStatus is how far a revision on trial is.
type trialStatus struct {
	Ready int             `json:"ready"`
	Of    int             `json:"of"`
	From  uint32          `json:"from"` // the revision that comes back if it fails
	Until time.Time       `json:"until"`
	Stuck *ledger.Failure `json:"stuck,omitzero"`
}

type workloadStatus struct {
	Name     string              `json:"name"`
	ID       contract.WorkloadID `json:"id"`
	Contract contract.ID         `json:"contract"`
	Service  string              `json:"service"`
	Replica  int                 `json:"replica"`
	Node     string              `json:"node"`
	Epoch    uint64              `json:"epoch"`
	State    string              `json:"state"`
	Reason   string              `json:"reason"` // why it is not as it should be
	Restarts uint32              `json:"restarts"`
	Settled  bool                `json:"settled"`           // it is as it should be: it runs, or ended as it should
	Saved    *time.Time          `json:"saved,omitempty"`   // what its volumes had then outlives its node
	Unsaved  string              `json:"unsaved,omitempty"` // why nothing newer does
}

// loss says what of a workload's volumes would be lost with its node.
func (w *workloadStatus) loss(now time.Time) string {
	text := ""
	switch {
	case w.Saved != nil:
		text = fmt.Sprintf("%v ago", max(0, now.Sub(*w.Saved)).Round(time.Second))
	case w.Unsaved != "":
		text = "never"
	}
	if w.Unsaved != "" {
		text += ": " + w.Unsaved
	}
	return text
}

// serving is the state of a route that answers.
const serving = "serving"

type routeStatus struct {
	Host     string      `json:"host"`
	URL      string      `json:"url"`
	State    string      `json:"state"` // serving, or what came instead
	Contract contract.ID `json:"contract"`
}

// collect reads the state of the grid, with one contract or with all that the ledger has.
func (a *app) collect(ctx context.Context, c *api.Client, p *prober, only contract.ID) (*status, error) {
	v, err := c.Read(ctx, ledger.ContractsKey)
	if err != nil {
		return nil, err
	}
	s := &status{Grid: c.Grid(), Height: v.Height, Nodes: []nodeStatus{}, Contracts: []contractStatus{}, Workloads: []workloadStatus{}, Routes: []routeStatus{}}
	g := c.Genesis()
	set, err := c.Validators(ctx)
	if err != nil {
		return nil, err
	}
	if len(set.Members) == 1 {
		s.Warnings = append(s.Warnings, oneValidator)
	}
	s.Warnings = append(s.Warnings, "node key on disk: a farmer who reads his node's disk while it runs or not can act as that node")
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return nil, err
	}
	names := map[identity.NodeID]*ledger.Node{}
	for _, n := range nodes {
		names[n.ID] = n
		s.Nodes = append(s.Nodes, nodeStatus{n.ID, n.Name, n.FarmName, upDown(n.Up), g.Lease.String(), time.UnixMilli(n.Since).UTC(), "on disk"})
	}
	if s.Blobs, err = c.BlobPlace(ctx); err != nil {
		s.Warnings = append(s.Warnings, "where blobs are is not known: "+err.Error())
	}
	beats, err := c.Reports(ctx, nodes)
	if err != nil {
		return nil, err
	}
	reports := byWorkload(beats)
	ids := []contract.ID{only}
	if only.IsZero() {
		ids = nil
		if raw, ok := v.Value(ledger.ContractsKey); ok {
			l, err := ledger.Decode[[]contract.ID](raw)
			if err != nil {
				return nil, err
			}
			ids = *l
		}
	}
	var keys, assigned []string
	for _, id := range ids {
		keys, assigned = append(keys, ledger.ContractKey(id)), append(assigned, ledger.AssignmentsKey(id))
	}
	recs, err := api.GetAll[ledger.Contract](ctx, c, keys)
	if err != nil {
		return nil, err
	}
	as, err := api.GetAll[ledger.Assignments](ctx, c, assigned)
	if err != nil {
		return nil, err
	}
	for i, rec := range recs {
		if rec == nil {
			return nil, fmt.Errorf("contract %v: %w", ids[i], ledger.ErrAbsent)
		}
		s.Contracts = append(s.Contracts, statusOf(rec, as[i]))
		if as[i] == nil {
			continue
		}
		for _, x := range as[i].Current {
			number := rec.Number(as[i].Revision)
			if x.Old {
				number = rec.Number(as[i].From)
			}
			s.Workloads = append(s.Workloads, workload(rec, number, &x, names[x.Node], reports[x.Workload]))
		}
	}
	routes, err := api.List[string, ledger.Route](ctx, c, ledger.RoutesKey, ledger.RouteKey)
	if err != nil {
		return nil, err
	}
	routes = slices.DeleteFunc(routes, func(r *ledger.Route) bool { return !only.IsZero() && r.Contract != only })
	s.Routes = make([]routeStatus, len(routes))
	eg, ctx := errgroup.WithContext(ctx)
	for i, r := range routes {
		eg.Go(func() error {
			s.Routes[i] = routeStatus{r.Host, p.url(r.Host), p.probe(ctx, r.Host), r.Contract}
			return nil
		})
	}
	return s, eg.Wait()
}

// byWorkload sorts what nodes report.
func byWorkload(beats []*ledger.Heartbeat) map[contract.WorkloadID][]ledger.Report {
	out := map[contract.WorkloadID][]ledger.Report{}
	for _, h := range beats {
		for _, r := range h.Workloads {
			out[r.Workload] = append(out[r.Workload], r)
		}
	}
	return out
}

// statusOf is what the ledger has of a contract.
func statusOf(rec *ledger.Contract, as *ledger.Assignments) contractStatus {
	newest := rec.Revisions[len(rec.Revisions)-1]
	s := contractStatus{ID: rec.ID, Name: rec.Name, Revision: int(rec.Revision), State: rec.State, Undone: rec.Undone(newest)}
	if t := rec.Trial; t.On() && !t.From.IsZero() && as != nil {
		s.Trial = &trialStatus{Of: len(as.Current), From: rec.Number(t.From), Until: time.UnixMilli(t.Until).UTC(), Stuck: t.Stuck}
		for _, a := range as.Current {
			if a.Ready {
				s.Trial.Ready++
			}
		}
	}
	return s
}

// text is what is to be said of a contract beside its state.
func (s *contractStatus) text() string {
	switch t := s.Trial; {
	case t != nil && t.Stuck != nil:
		return fmt.Sprintf("revision %d is on trial and stands still: %s", s.Revision, t.Stuck.Where())
	case t != nil:
		return fmt.Sprintf("revision %d is on trial: %d of %d are ready", s.Revision, t.Ready, t.Of)
	case s.Undone != nil:
		return fmt.Sprintf("revision %d was rolled back to %d: %s", s.Undone.Number, s.Revision, s.Undone.Where())
	}
	return ""
}

// workload joins what the ledger wants, of the revision with that number, with what the node that is assigned says.
func workload(rec *ledger.Contract, number uint32, x *ledger.Assignment, n *ledger.Node, reports []ledger.Report) workloadStatus {
	w := workloadStatus{
		Name: fmt.Sprintf("%s/%s-%d", rec.Name, x.Service, x.Replica), ID: x.Workload, Contract: rec.ID, Service: x.Service, Replica: int(x.Replica), Epoch: x.Epoch,
		State: "assigned", Reason: x.Reason,
	}
	if n != nil {
		w.Node = n.Name
	}
	switch {
	case x.Reason != "":
		w.State = ledger.StateWaiting
		return w
	case n == nil || !n.Up:
		w.State, w.Reason = ledger.StateWaiting, "its node is down"
		return w
	}
	for _, r := range reports {
		if r.Epoch == x.Epoch && r.Revision == number {
			w.State, w.Reason, w.Restarts = printable([]byte(r.State)), printable([]byte(r.Reason)), r.Restarts // a farmer's words
			w.Unsaved = printable([]byte(r.Unsaved))
			if r.Saved > 0 {
				t := time.UnixMilli(r.Saved).UTC()
				w.Saved = &t
			}
			w.Settled = r.State == ledger.StateRunning || r.State == ledger.StateExited && r.ExitCode == 0
		}
	}
	return w
}

// prober asks a route through the gateway as a browser does.
type prober struct {
	gateway string
	client  *http.Client
}

func newProber(c *ca.CA, gateway string) *prober {
	pool := x509.NewCertPool()
	if c != nil {
		pool.AppendCertsFromPEM(c.Root())
	}
	return &prober{gateway, &http.Client{
		Timeout:       5 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{
			DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: pool},
			DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, network, gateway)
			},
		},
	}}
}

func (p *prober) url(host string) string {
	_, port, err := net.SplitHostPort(p.gateway)
	if err != nil || port == "443" {
		return "https://" + host + "/"
	}
	return "https://" + host + ":" + port + "/"
}

func (p *prober) probe(ctx context.Context, host string) string {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url(host), nil)
	if err != nil {
		return err.Error()
	}
	resp, err := p.client.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		var ce *tls.CertificateVerificationError
		switch {
		case errors.As(err, &ce):
			return "certificate is not from your CA"
		case strings.Contains(err.Error(), "unrecognized name"):
			return "not routed yet"
		}
		return "no answer"
	}
	resp.Body.Close()
	if resp.StatusCode >= 500 {
		return fmt.Sprintf("answers %d", resp.StatusCode)
	}
	return serving
}

func (a *app) statusCmd() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show nodes, contracts, workloads and routes", Args: asUsed,
		Long:    "What the ledger wants comes with proofs, what the nodes see comes signed by them, and routes are asked through the\ngateway.",
		Example: "  holdfast status\n  holdfast status --json | jq .workloads",
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, cfg, err := a.connect()
			if err != nil {
				return err
			}
			defer c.Close()
			authority, err := a.authority()
			if err != nil {
				return err
			}
			s, err := a.collect(cmd.Context(), c, newProber(authority, cfg.Gateway), contract.ID{})
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if a.json {
				return printJSON(w, s)
			}
			fmt.Fprintf(w, "grid %s at height %d\n", s.Grid.Short(), s.Height)
			for _, x := range s.Warnings {
				fmt.Fprintln(w, "warning:", x)
			}
			if s.Blobs != nil {
				fmt.Fprintf(w, "blobs are in the %v\n", s.Blobs)
			}
			fmt.Fprintln(w)
			rows := [][]string{{"NODE", "FARM", "STATE", "LEASE"}}
			for _, n := range s.Nodes {
				rows = append(rows, []string{n.Name, n.Farm, stateColour(w, n.State), n.Lease})
			}
			table(w, rows...)
			if len(s.Contracts) == 0 {
				fmt.Fprintln(w, "\nno contracts yet: holdfast deploy FILE makes one")
				return nil
			}
			fmt.Fprintln(w)
			rows = [][]string{{"CONTRACT", "REVISION", "STATE", "ID"}}
			for _, x := range s.Contracts {
				rows = append(rows, []string{x.Name, fmt.Sprint(x.Revision), stateColour(w, x.State), x.ID.Short()})
			}
			table(w, rows...)
			for _, x := range s.Contracts {
				if t := x.text(); t != "" {
					fmt.Fprintf(w, "%s: %s\n", x.Name, t)
				}
			}
			showWorkloads(w, s)
			showRoutes(w, s)
			return nil
		},
	}
}

func showWorkloads(w io.Writer, s *status) {
	if len(s.Workloads) == 0 {
		return
	}
	fmt.Fprintln(w)
	// A column that is empty is not shown: most contracts have no volumes.
	now, volumes := time.Now(), slices.ContainsFunc(s.Workloads, func(x workloadStatus) bool { return x.loss(time.Now()) != "" })
	saved := func(text string) []string {
		if !volumes {
			return nil
		}
		return []string{text}
	}
	rows := [][]string{append(append([]string{"WORKLOAD", "NODE", "EPOCH", "STATE", "RESTARTS"}, saved("SAVED")...), "REASON")}
	for _, x := range s.Workloads {
		row := append([]string{x.Name, x.Node, fmt.Sprint(x.Epoch), stateColour(w, x.State), fmt.Sprint(x.Restarts)}, saved(x.loss(now))...)
		rows = append(rows, append(row, x.Reason))
	}
	table(w, rows...)
}

func showRoutes(w io.Writer, s *status) {
	if len(s.Routes) == 0 {
		return
	}
	fmt.Fprintln(w)
	rows := [][]string{{"ROUTE", "STATE"}}
	for _, x := range s.Routes {
		rows = append(rows, []string{x.URL, stateColour(w, x.State)})
	}
	table(w, rows...)
}
