package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"holdfast/access"
	"holdfast/api"
	"holdfast/contract"
	"holdfast/deploy"
	"holdfast/internal/grid"
	"holdfast/ledger"
	"holdfast/node"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
)

func (a *app) logsCmd() *cobra.Command {
	var follow bool
	var lines int
	cmd := &cobra.Command{
		Use: "logs CONTRACT [SERVICE]", Short: "Show what workloads wrote", Args: asUsed,
		Long:    "Fetches output from the nodes, end-to-end encrypted: a gateway passes it on and cannot read it. Nothing of it is on the\nledger.",
		Example: "  holdfast logs pocketbase\n  holdfast logs reader db --tail 20\n  holdfast logs reader web -f",
		RunE: func(cmd *cobra.Command, args []string) error {
			u, cfg, err := a.user(cmd.Context())
			if err != nil {
				return err
			}
			defer u.Client.Close()
			return a.logs(cmd.Context(), cmd.OutOrStdout(), u, cfg, args, follow, lines)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on as lines come")
	cmd.Flags().IntVar(&lines, "tail", 200, "how many `lines` of what was written before")
	return cmd
}

// logs fetches from each node that runs a workload of the contract.
func (a *app) logs(ctx context.Context, out io.Writer, u *deploy.User, cfg *grid.Client, args []string, follow bool, lines int) error {
	rec, err := u.Find(ctx, args[0])
	if err != nil {
		return err
	}
	as, err := api.Get[ledger.Assignments](ctx, u.Client, ledger.AssignmentsKey(rec.ID))
	if errors.Is(err, ledger.ErrAbsent) {
		as = &ledger.Assignments{}
	} else if err != nil {
		return err
	}
	nodes, err := u.Client.Nodes(ctx)
	if err != nil {
		return err
	}
	if lines < 0 {
		return fmt.Errorf("--tail %d: it cannot be less than 0", lines)
	}
	var from []ledger.Assignment
	for _, x := range as.Current {
		if (len(args) < 2 || x.Service == args[1]) && !x.Node.IsZero() {
			from = append(from, x)
		}
	}
	if len(from) == 0 {
		return nothingToRead(as, args)
	}
	w := &lineWriter{w: out, json: a.json}
	var eg errgroup.Group
	for _, x := range from {
		i := slices.IndexFunc(nodes, func(n *ledger.Node) bool { return n.ID == x.Node })
		if i < 0 {
			continue
		}
		name, prefix := fmt.Sprintf("%s-%d", x.Service, x.Replica), ""
		if len(from) > 1 {
			prefix = name + " | "
		}
		fetch := func() error {
			to := w.of(name, prefix)
			err := errors.Join(fetchLogs(ctx, u, cfg.Gateway, nodes[i], x.Workload, follow, lines, to), to.Close())
			if err != nil {
				return fmt.Errorf("%s on %s: %w", name, nodes[i].Name, err)
			}
			return nil
		}
		if follow {
			eg.Go(fetch)
		} else if err := fetch(); err != nil {
			return err
		}
	}
	return eg.Wait()
}

// nothingToRead says why: no such service, or nothing of it on any node.
func nothingToRead(as *ledger.Assignments, args []string) error {
	var known []string
	for _, x := range as.Current {
		known = append(known, x.Service)
	}
	slices.Sort(known)
	known = slices.Compact(known)
	if len(args) > 1 && len(known) > 0 && !slices.Contains(known, args[1]) {
		return fmt.Errorf("%s has no service %q: it has %s", args[0], args[1], strings.Join(known, ", "))
	}
	return fmt.Errorf("no workload of %s runs anywhere", strings.Join(args, " "))
}

func fetchLogs(ctx context.Context, u *deploy.User, gateway string, n *ledger.Node, id contract.WorkloadID, follow bool, lines int, w io.Writer) error {
	q := url.Values{"tail": {fmt.Sprint(lines)}}
	if follow {
		q.Set("follow", "1")
	}
	return askNode(ctx, u, gateway, n, "/v1/logs/"+id.String()+"?"+q.Encode(), w)
}

// askNode asks a node's own service, through a gateway that can read neither question nor answer, and passes the answer on.
func askNode(ctx context.Context, u *deploy.User, gateway string, n *ledger.Node, path string, w io.Writer) error {
	name := node.ServiceName(n.ID)
	tr := &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, gateway)
		},
		TLSClientConfig: &tls.Config{
			ServerName: name, MinVersion: tls.VersionTLS13, InsecureSkipVerify: true, // the key is pinned by the ledger instead
			VerifyConnection: func(cs tls.ConnectionState) error {
				if sha256.Sum256(cs.PeerCertificates[0].RawSubjectPublicKeyInfo) != n.TLS {
					return fmt.Errorf("the answer is not from %s: its key is another", n.Name)
				}
				return nil
			},
		},
	}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+name+path, nil)
	if err != nil {
		return err
	}
	access.Sign(req, n.TLS, u.Account, u.Keys.DeviceKey(), time.Now())
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return errors.New(strings.TrimSpace(string(b)))
	}
	_, err = io.Copy(w, resp.Body)
	return err
}
